"""denoise.py from image files to image files: a student applied, trained from scratch, interrupted; tiles; ONNX."""

import os
import subprocess
import sys
import time

import nibabel
import numpy as np
import onnxruntime
import pydicom
import pytest
import tifffile
import torch
from conftest import ROOT, TINY, ok, run
from test_formats import dicom
from test_measure import phantom

import data
import denoise
import distill
import noise
from lib import apply, files, record, runtime, training


@pytest.fixture(scope="module", params=["resunet"])
def student(made, tmp_path_factory, request):
    """A student whose change to an image can be seen."""
    path = tmp_path_factory.mktemp("student") / "student.pt"
    flags = ["--data", made / "knee.h5", "--target", made / "srds_out.h5", *TINY["distill"], "--steps", 30]
    flags += ["--arch", request.param]
    ok("distill", *flags, "--model", path, "--out", path.with_suffix(".h5"), cwd=made)
    return path


@pytest.fixture
def scans(tmp_path):
    """Five DICOM slices and an array, 192 pixels, noisy."""
    (tmp_path / "scans" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    y = np.stack([noise.add(x, "gaussian", 10 / 255, 0, rng) for x in phantom(5)])
    for s in range(5):
        dicom(tmp_path / "scans" / f"{s}.dcm", np.clip(3000 * y[s] + 300, 0, 4095).astype(np.uint16), s)
    np.save(tmp_path / "scans" / "deep" / "a.npy", y[0])
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_student_on_files(scans, student):
    """The student's output for the stored numbers, in the same places; again, nothing is done; others' files stay."""
    done = ok("denoise", "scans", "--out", "clean", "--model", student, cwd=scans)
    assert "6 files written to clean, 0 were there already, 0 left out" in done.stdout
    y = np.load(scans / "scans/deep/a.npy")
    scaled = (y - y.min()) / (y.max() - y.min())
    x = distill.student(student)(torch.from_numpy(scaled)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(np.load(scans / "clean/deep/a.npy"), x * (y.max() - y.min()) + y.min(), atol=2e-3)
    assert np.std(x - scaled) > 0.01
    before = contents(scans / "clean")
    again = ok("denoise", "scans", "--out", "clean", "--model", student, cwd=scans)
    assert "0 files written to clean, 6 were there already" in again.stdout and contents(scans / "clean") == before
    (scans / "other").mkdir()
    (scans / "other" / "0.dcm").write_bytes(b"precious")
    done = run("denoise", "scans", "--out", "other", "--model", student, cwd=scans)
    assert done.returncode == 1 and "0.dcm exists already, and is not of this run: --force replaces it" in done.stderr
    assert (scans / "other" / "0.dcm").read_bytes() == b"precious" and (scans / "other/deep/a.npy").exists()
    done = run("denoise", "scans", "--out", "clean", "--model", student, "--key", "x", cwd=scans)
    assert done.returncode == 1 and "exists already, and is not of this run" in done.stderr
    assert contents(scans / "clean") == before
    ok("denoise", "scans", "--out", "other", "--model", student, "--force", cwd=scans)
    assert pydicom.dcmread(scans / "other" / "0.dcm").ImageType[0] == "DERIVED"


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(scans, student):
    folder = scans / "scans"
    (folder / "notes.txt").write_text("not an image")
    (folder / "half.npy").write_bytes((folder / "deep/a.npy").read_bytes()[:5000])
    (folder / "2.dcm").write_bytes((folder / "2.dcm").read_bytes()[:5000])
    (folder / "gone.dcm").symlink_to("nowhere")
    np.save(folder / "colour.npy", np.zeros((2, 3, 20, 20)))
    done = run("denoise", "scans", "--out", "clean", "--model", student, cwd=scans)
    assert done.returncode == 1 and "5 files written" in done.stdout and "5 left out" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 5 and all("left out: scans/" in line for line in lines), lines
    for name in ("notes.txt", "half.npy", "2.dcm", "colour.npy", "gone.dcm"):
        assert sum(name in line for line in lines) == 1
    assert not (scans / "clean/2.dcm").exists() and (scans / "clean/3.dcm").exists()
    assert "Doe^Jane" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "flags, says",
    [
        (["scans", "--out", "scans"], "lies in the input"),
        (["scans", "--out", "scans/deep/clean"], "lies in the input"),
        (["scans/deep/a.npy", "--out", "scans/deep"], "would replace the input"),
        (["scans", "--out", "scans/deep/a.npy"], "lies in the input"),
        (["nowhere", "--out", "clean"], "nowhere does not exist"),
        (["empty", "--out", "clean"], "holds no DICOM"),
        (["scans", "--out", "clean", "--model", "nothing.pt"], "nothing.pt does not exist"),
        (["scans", "--out", "clean", "--model", "scans/0.dcm"], "is not a whole checkpoint"),
        (["scans", "--out", "clean", "--memory", "much"], "not a number of bytes"),
        (["scans/deep", "--out", "x", "--acquisition", "AXT2", "--model", "x.pt"], "x.pt does not exist"),
        (["--data", "x.h5", "--force"], "these are for image files"),
        (["scans", "--demo"], "give image files or folders, or --data, or --demo"),
        ([], "give image files or folders, or --data, or --demo"),
    ],
)
def test_wrong_use_is_refused(scans, flags, says):
    (scans / "empty").mkdir()
    before = contents(scans)
    done = run("denoise", *flags, cwd=scans)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert contents(scans) == before


def test_from_scratch_and_killed(scans):
    """Trained on the files themselves; killed at any moment and started again, the same bits; nothing personal."""
    flags = ["scans", "--effort", "0.01", "--precision", "float32"]
    started = time.monotonic()
    ok("denoise", *flags, "--out", "clean", cwd=scans)
    seconds, expected = time.monotonic() - started, contents(scans / "clean")
    assert {"0.dcm", "deep/a.npy", "diffdenoise/tuned.pt", "diffdenoise/best.json"} <= expected.keys()
    for moment in (0.3, 0.8):
        argv, silent = [sys.executable, str(ROOT / "denoise.py"), *flags, "--out", "killed"], subprocess.DEVNULL
        process = subprocess.Popen(argv, cwd=scans, stdout=silent, stderr=silent)
        try:
            process.wait(moment * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    ok("denoise", *flags, "--out", "killed", cwd=scans)
    again = contents(scans / "killed")
    images = [name for name in expected if "diffdenoise" not in name and name != "report.html"]
    assert len(images) == 6 and all(again[name] == expected[name] for name in images)
    personal = [name for name, raw in expected.items() if b"Doe^Jane" in raw]
    assert personal and all(name.endswith(".dcm") for name in personal)
    log = record.read(scans / "clean/diffdenoise")
    assert len(log) == 2 and all(state["whole"] for state in log.values())


def test_std(scans, student):
    """The uncertainty beside each file, in its units; also of a student alone, if it knows its noise."""
    done = ok("denoise", "scans", "--std", "--instant", "--out", "clean", cwd=scans)
    assert "recipe tuned" in done.stdout
    names = contents(scans / "clean").keys()
    assert {"0.dcm", "0.dcm_std.tif", "deep/a.npy", "deep/a.npy_std.tif"} <= names
    y, x = (np.load(scans / folder / "deep/a.npy") for folder in ("scans", "clean"))
    std = tifffile.imread(scans / "clean/deep/a.npy_std.tif")[0]
    assert std.shape == y.shape and 0.1 * np.std(y - x) < std.mean() < np.std(y - x)
    ok("denoise", "scans", "--std", "--model", "clean/diffdenoise/student.pt", "--out", "again", cwd=scans)
    assert np.allclose(tifffile.imread(scans / "again/deep/a.npy_std.tif")[0], std, rtol=0.2)
    refused = run("denoise", "scans", "--std", "--model", student, "--out", "no", cwd=scans)
    assert refused.returncode == 2 and "knows no noise model" in refused.stderr


def test_full_disk(scans, student, monkeypatch):
    """A file that cannot be written is named, nothing stands half under its name, and with room again it is made."""
    jobs, problems = files.plan([scans / "scans"], scans / "out")
    real, writes = os.replace, []

    def full(a, b):
        writes.append(b)
        if len(writes) % 3 == 0:
            raise OSError(28, "No space left on device")
        real(a, b)

    monkeypatch.setattr(os, "replace", full)
    denoise = distill.student(student)
    apply.denoise_files(jobs, denoise, "m", scans, problems)
    assert problems and all("No space left" in p for p in problems)
    monkeypatch.undo()
    assert not list(scans.rglob("*.tmp"))
    assert apply.denoise_files(jobs, denoise, "m", scans, [])[0] > 0
    assert apply.denoise_files(jobs, denoise, "m", scans, []) == (0, 6)


def test_a_large_folder_is_trained_on_in_part(tmp_path, monkeypatch):
    """Of each file a window with its neighbours, of all so many pixels; normalised as the whole."""
    monkeypatch.setattr(files, "WINDOW", 40)
    monkeypatch.setattr(files, "PIXELS", 12_000)
    (tmp_path / "scans").mkdir()
    for k in range(30):
        y = np.random.default_rng(k).integers(100, 900, (3, 64, 50)).astype(np.uint16)
        y[:, :1, 0], y[:, -1:, -1] = 0, 1000  # the ends lie in corners that a window may miss
        np.save(tmp_path / "scans" / f"{k}.npy", y)
    jobs, problems = files.plan([tmp_path / "scans"], tmp_path / "out")
    for name, most in (("windows.h5", 12_000), ("all.h5", 10**9)):
        monkeypatch.setattr(files, "PIXELS", most)
        data.write_dataset(tmp_path / name, files.training_volumes(jobs, problems, 16), [1.0, 0, 0], {})
    windows, attrs = data.read_volumes(tmp_path / "windows.h5"), data.read_attrs(tmp_path / "windows.h5")[1]
    complete = data.read_volumes(tmp_path / "all.h5")
    assert not problems and len(complete) == 30 and complete["00000-0000"].shape == (3, 64, 50)
    assert 12_000 <= sum(v.size for v in windows.values()) < 12_000 + 3 * 40 * 40
    for name, volume in windows.items():
        assert volume.shape == (3, 40, 40) and attrs[name]["scale"] == 1000 and attrs[name]["offset"] == 0
        stack = np.lib.stride_tricks.sliding_window_view(complete[name], (40, 40), (1, 2))
        assert any(np.array_equal(volume, stack[:, i, j]) for i, j in np.ndindex(stack.shape[1:3]))


def test_many_small_images_are_trained_on(tmp_path, monkeypatch):
    """Smaller than a crop, all of them, and more than are wanted: some are taken, and not none."""
    monkeypatch.setattr(files, "PIXELS", 4000)
    (tmp_path / "scans").mkdir()
    for k in range(9):
        np.save(tmp_path / "scans" / f"{k}.npy", np.random.default_rng(k).random((1, 32, 32)))
    jobs, problems = files.plan([tmp_path / "scans"], tmp_path / "out")
    taken = list(files.training_volumes(jobs, problems, 96))
    assert 4 <= len(taken) < 9 and not problems


def test_one_large_image_is_trained_on_where_it_varies(monkeypatch):
    """What fits its share is taken whole; of a larger one, the window of some that varies most."""
    monkeypatch.setattr(files, "WINDOW", 32)
    image = np.zeros((1, 200, 300), np.uint16)
    image[:, 100:, 200:] = np.random.default_rng(0).integers(0, 9, (1, 100, 100))
    assert image[files.training_runs(image, image.size, runtime.step_rng(0))[0]].shape == image.shape
    (got,) = (image[area] for area in files.training_runs(image, 6400, runtime.step_rng(0)))
    assert got.shape == (1, 80, 80) and got.std() > 0


def test_a_large_volume_is_trained_on_in_runs_of_neighbours():
    """Evenly over the volume, 8 slices at a time, or 5 where the share allows less."""
    volume = np.arange(100, dtype=np.uint16)[:, None, None] * np.ones((1, 32, 32), np.uint16)
    for share, lengths in ((32 * 1024, [8] * 4), (3 * 1024, [5])):
        runs = [volume[area] for area in files.training_runs(volume, share, runtime.step_rng(0))]
        assert [len(run) for run in runs] == lengths
        assert all((np.diff(run[:, 0, 0]) == 1).all() for run in runs)
    first = [area[0].start for area in files.training_runs(volume, 32 * 1024, runtime.step_rng(0))]
    assert first == [0, 31, 61, 92]


@pytest.mark.parametrize("size", [(300, 130), (97, 400), (64, 64)])
def test_tiles_of_a_local_function_are_exact(size):
    """What reaches no farther than a quarter of the overlap does not notice that there are tiles."""
    y = torch.rand(1, 1, *size)
    blur = torch.nn.AvgPool2d(9, 1, 4, count_include_pad=False)
    torch.testing.assert_close(data.tiled(blur, y, 96, 64), blur(y), rtol=0, atol=1e-6)
    assert not data.tiled(blur, y, 96, 4).allclose(blur(y), atol=1e-4) or max(size) <= 96


def test_tiles_of_a_batch_are_as_many_as_memory_allows():
    """No call sees more than side x side pixels, whether of one image in tiles or of several."""
    seen = []
    for shape in ((5, 1, 60, 48), (3, 1, 200, 96)):
        y = torch.rand(*shape)
        made = data.tiled(lambda v: seen.append(v.numel()) or v, y, 96, 64)
        torch.testing.assert_close(made, y)
    assert max(seen) <= 96**2 and seen[0] == 3 * 60 * 48


@pytest.mark.parametrize("student", ["nafnet", "resunet"], indirect=True)
def test_tiles_of_the_student_leave_no_seam(student):
    """A trained network whole and in tiles: at most 1e-3 of the range apart, sizes that nothing divides."""
    model, state = training.load_network(distill.build_network, student, "distill", "cpu")
    model.pool_locally(state["extra"]["crop"])
    y = torch.from_numpy(np.stack(phantom(1, 700))[None]).float()[..., :611]
    with torch.inference_mode():
        y += torch.randn(y.shape, generator=torch.Generator().manual_seed(0)) * 0.03
        assert (data.tiled(model, y, 384, 160) - model(y)).abs().max() < 1e-3


@pytest.mark.parametrize("context", [0, 2])
def test_onnx_of_a_shipped_network(context, tmp_path):
    """Students that are told the noise, as denoise.py makes them; the noise is stored with them."""
    y = np.random.default_rng(0).random((6, 48, 40)).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    ok("data", "import", "y.npy", "--split", "train", "--out", "y.h5", cwd=tmp_path)
    flags = ["--target", "recorrupted", "--noise", "gaussian:0.1", "--steps", 0, "--crop", 32]
    flags += ["--init", denoise.WEIGHTS[context]]
    ok("distill", "--data", "y.h5", *flags, "--split", "train", "--model", "m.pt", "--out", "m.h5", cwd=tmp_path)
    ok("distill", "--export", "m.onnx", "--model", "m.pt", cwd=tmp_path)
    session, model = (
        onnxruntime.InferenceSession(tmp_path / "m.onnx"),
        distill.student(tmp_path / "m.pt", precision="float32"),
    )
    for count, h, w in ((1, 97, 51), (3, 40, 64)):
        y = torch.rand(count, 2 * context + 1, h, w)
        np.testing.assert_allclose(session.run(None, {"noisy": y.numpy()})[0], model.once(y), atol=1e-4)


@pytest.mark.parametrize("student", ["nafnet", "resunet"], indirect=True)
def test_onnx(student, tmp_path):
    """Equal to PyTorch within 1e-4 at sizes above and below the pooling window, odd, batched."""
    ok("distill", "--export", tmp_path / "student.onnx", "--model", student, cwd=tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    model, state = training.load_network(distill.build_network, student, "distill", "cpu")
    model.pool_locally(state["extra"]["crop"])
    for shape in ((1, 1, 97, 203), (3, 1, 40, 16), (1, 1, 256, 256)):
        y = torch.rand(shape)
        with torch.inference_mode():
            np.testing.assert_allclose(session.run(None, {"noisy": y.numpy()})[0], model(y), atol=1e-4)


def test_what_is_no_image_is_left_alone(tmp_path, student):
    """Label maps, masks, maps by name and by header: a line each, exit code 1; --force denoises them."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    image = np.uint16(1000 + 200 * rng.standard_normal((3, 32, 32)))
    labels = np.kron(rng.integers(0, 5, (3, 8, 8)), np.ones((1, 4, 4), int)).astype(np.uint16)
    named = dict(image=image, areas=labels, brain=np.uint8(labels > 2), sub_T1map=image, masked_head=image)
    for name, array in named.items():
        np.save(tmp_path / "in" / f"{name}.npy", array)
    for code, name in ((0, "t1.nii"), (3, "contrast.nii")):
        made = nibabel.Nifti1Image(image.T.astype(np.int16), np.eye(4))
        made.header["intent_code"] = code
        nibabel.save(made, tmp_path / "in" / name)
    done = run("denoise", "in", "--model", student, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1 and "3 files written" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "image.npy",
        "masked_head.npy",
        "t1.nii",
        "diffdenoise",
        "report.html",
    }
    said = ["has the value of its neighbours: a label map", "only two values: a mask", "its name says T1map"]
    said += ["its header calls it a map of a statistic"]
    assert [done.stderr.count(text) for text in said] == [1, 1, 1, 1], done.stderr
    assert done.stderr.count("left alone") == 4
    forced = ok("denoise", "in", "--model", student, "--out", "all", "--force", cwd=tmp_path)
    assert "7 files written" in forced.stdout
