"""The default recipe where users have gone wrong: large folders, odd names, options that do not go together."""

import json

import nibabel
import numpy as np
import pytest
import tifffile
from conftest import ellipses, ok, run
from PIL import Image
from test_measure import phantom

import data
import denoise
import distill
import evaluate
import noise
from lib import crops, files, runtime


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder with in/a.npy and in/b.npy, two noisy volumes of alike slices."""
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    (folder / "in").mkdir()
    for name in "ab":
        x = np.repeat(ellipses(rng, 1, 64, 72), 6, 0)
        np.save(folder / f"in/{name}.npy", (1000 * (x + 0.05 * rng.standard_normal(x.shape))).astype(np.float32))
    return folder


def test_data_that_stays_on_disk(scans, monkeypatch):
    """Slice by slice from the disk, as with folders of several volumes, all is what it is from memory."""
    flags = ["in", "--effort", 0.002, "--seed", 1, "--out"]
    ok("denoise", *flags, "memory", cwd=scans)
    monkeypatch.setattr(data, "TO_PREDICT", 0)
    monkeypatch.setattr(data.read_volumes, "__defaults__", ("noisy", None, 0, None))
    assert isinstance(data.read_volumes(scans / "memory/diffdenoise/dataset.h5")["00000-0000"], data.Streamed)
    ok("denoise", *flags, "disk", cwd=scans)
    for name in "ab":
        np.testing.assert_array_equal(*(np.load(scans / out / f"{name}.npy") for out in ("memory", "disk")))


@pytest.mark.parametrize("name", ["T1+C", "lr=3"])
def test_names_with_signs(scans, name):
    """Folders whose names hold what separates two models, or a name from a file."""
    ok("denoise", "in", "--instant", "--out", name, cwd=scans)
    assert set(json.loads((scans / name / "diffdenoise/best.json").read_text())) >= {"shipped network", "noisy"}


def test_noise_that_differs_along_rows_and_columns_is_not_turned(scans, monkeypatch):
    """What is drawn for recorruption lies in the crops as their own noise does: crops are flipped alone."""
    law = noise.make_noise_model([0.0025, 0, 0], np.eye(13)[6][:, None] * np.array([*[0] * 5, 0.5, 1, 0.5, *[0] * 5]))
    assert noise.symmetries(law) == 4 and noise.symmetries(noise.known("gaussian", 0.1, 1.2)) == 8
    assert noise.symmetries(noise.known("gaussian", 0.1) | dict(band=[0.5, 0.3])) == 4 and noise.symmetries(None) == 8
    stack = {"v": np.arange(16 * 16, dtype=np.float32).reshape(1, 16, 16)}
    for count in (4, 8):
        made = crops.random_crops([stack], 64, 16, np.random.default_rng(0), symmetries=count)[0].numpy()
        flat = [abs(int(crop[0, 0, 1] - crop[0, 0, 0])) == 1 for crop in made]  # neighbours in a row are 1 apart
        assert all(flat) is (count == 4)
    seen = []
    monkeypatch.setattr(data, "random_crops", lambda *args, **_: seen.append(args[-1]) or crops.random_crops(*args))
    (scans / "law.json").write_text(json.dumps(law))
    ok("data", "import", "in", "--split", "train", "--out", "d.h5", cwd=scans)
    flags = ["--data", "d.h5", "--target", "recorrupted", "--steps", 1, "--crop", 32, "--width", 8, "--noise"]
    for known in ("law.json", "gaussian:0.05"):
        ok("distill", *flags, known, "--model", "m.pt", "--out", "m.h5", cwd=scans)
    assert seen == [4, 8]


def test_options_that_do_not_go_together(scans):
    """One line before any training, exit code 2."""
    for says, flags in {
        "--recipe tuned --context 1: weights/ has networks of context 0 and 2": "in --recipe tuned --context 1",
        "--instant is for the recipe tuned, not scratch": "in --instant --context 1",
        "--std, --samples: the recipe paper has no noise model": "in --recipe paper --std --samples 2",
        "--rounds 2 is for the recipes scratch and paper": "in --rounds 2",
        "--ensemble, --memory: these are for image files alone": "--data d.h5 --ensemble 1 --memory 1G",
    }.items():
        done = run("denoise", *flags.split(), "--out", "refused", cwd=scans)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
        assert "steps in" not in done.stdout


def test_a_given_map_is_cut_as_the_volumes_are(scans, monkeypatch):
    """Where only runs and windows of a volume are trained on, each is divided by its own part of the map."""
    monkeypatch.setattr(files, "PIXELS", 4 * 10_000)
    monkeypatch.setattr(files, "WINDOW", 96)
    rng, g = np.random.default_rng(1), np.linspace(0.5, 2, 128)[None, :, None] * np.ones((12, 1, 136))
    x = np.repeat(ellipses(rng, 1, 128, 136), 12, 0)
    (scans / "one").mkdir()
    np.save(scans / "one/a.npy", (x + 0.05 * g * rng.standard_normal(x.shape)).astype(np.float32))
    np.save(scans / "map.npy", g.astype(np.float32))
    ok("denoise", *"one --instant --noise-map map.npy --out cut".split(), cwd=scans)
    volumes = data.read_volumes(scans / "cut/diffdenoise/even.h5", "gain")
    attrs = data.read_attrs(scans / "cut/diffdenoise/dataset.h5")[1]
    assert any(attrs[name]["place"][1] for name in volumes)
    for name, found in volumes.items():
        top, h = attrs[name]["place"][1], found.shape[1]
        np.testing.assert_allclose(found[0, :, 0], g[0, top : top + h, 0] / g.mean(), rtol=0.12)


def test_single_images_need_more_to_be_divided(tmp_path, monkeypatch):
    """What differs by 11 % from place to place is a volume's noise, but may be the texture of a single image."""
    y = ellipses(np.random.default_rng(0), 1, 160, 160) + np.random.default_rng(1).normal(0, 0.05, (3, 160, 160))
    monkeypatch.setattr(evaluate, "estimate", lambda *_, **__: dict(psnr=36.0, sd=0.0, noisy=26.0, uneven=0.11))
    for count, divided in ((1, False), (3, True)):
        np.save(tmp_path / f"{count}.npy", y[:count].astype(np.float32))
        said = ok("denoise", f"{count}.npy", "--instant", "--out", f"out{count}", cwd=tmp_path).stdout
        assert ("--noise-map-out" in said) is divided


def test_import_leaves_out_what_no_dataset_can_hold(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"good": rng.random((3, 20, 20)), "small": rng.random((3, 10, 10)), "flat": np.ones((3, 20, 20))}
    for name, array in (arrays | {"hole": np.full((3, 20, 20), np.nan)}).items():
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    for _ in range(2):  # what was written is no source
        done = run("data", "import", ".", "--out", "x.h5", cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("left out: ") == 4
        assert list(data.read_volumes(tmp_path / "x.h5")) == ["good"]
    np.savez(tmp_path / "one.npz", **{"t/x": arrays["good"]})
    np.savez(tmp_path / "two.npz", **{"t/x": arrays["good"]})
    ok("data", "import", "one.npz", "two.npz", "--out", "y.h5", cwd=tmp_path)
    assert len(data.read_volumes(tmp_path / "y.h5")) == 2
    done = run("data", "import", "flat.npy", "--out", "z.h5", cwd=tmp_path)
    assert done.returncode == 2 and "constant" in done.stderr and not (tmp_path / "z.h5").exists()


def test_no_broken_state_is_kept(tmp_path, monkeypatch):
    """A loss that is not finite is found before the state of the training is written."""
    from lib import training

    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(distill, "recorruption_loss", lambda f, y, *_: f(y).mean() * float("nan"))
    with data.write_volumes(tmp_path / "d.h5", "dataset", "test") as add:
        add("v", (3, 48, 48), ["noisy"], split="train")[0][:] = runtime.step_rng(0).random((3, 48, 48))
    flags = "--data d.h5 --target recorrupted --noise gaussian:0.1 --steps 5 --crop 32 --width 8".split()
    done = run("distill", *flags, "--model", "m.pt", cwd=tmp_path)
    assert done.returncode == 2 and "the loss is nan at step 1" in done.stderr
    assert not (tmp_path / "m.pt.part").exists()


def test_estimates_run_where_they_are_told(scans, monkeypatch):
    """evaluate.py passes --device and --precision on to the network that it runs."""
    asked = []
    student = distill.student
    monkeypatch.setattr(
        distill, "student", lambda path, *args, **more: asked.append(args) or student(path, *args, **more)
    )
    ok("data", "import", "in", "--split", "test", "--out", "t.h5", cwd=scans)
    flags = ["--no-reference", "--data", "t.h5", "--noise", "gaussian:0.05", "--model", denoise.WEIGHTS[2]]
    ok("evaluate", *flags, "--slices", 2, "--device", "cpu", "--precision", "float32", cwd=scans)
    assert asked == [("cpu", "float32")]
    assert evaluate.parse_predictions(["a=b/x=1.h5"]) == {"a": "b/x=1.h5"}


def test_no_slice_is_denoised_twice(scans, monkeypatch):
    """What the student made of the dataset is written to the files, the same as it makes of the files by itself."""
    plain, found = data.by_content, []

    def watched(*files):
        known = plain(*files)
        return lambda volume: found.append(known(volume)) or found[-1]

    monkeypatch.setattr(data, "by_content", watched)
    ok("denoise", "in", "--instant", "--out", "once", cwd=scans)
    assert len(found) == 2 and all(x is not None for x in found)
    ok("denoise", "in", "--model", "once/diffdenoise/student.pt", "--out", "again", cwd=scans)
    for name in "ab":
        once, again = (np.load(scans / out / f"{name}.npy") for out in ("once", "again"))
        np.testing.assert_allclose(once, again, atol=0.2)  # of about 1000, noise of 50: bfloat16 rounds by batches
    ok("denoise", "in", "--instant", "--ensemble", 8, "--out", "mean", cwd=scans)
    assert len(found) == 2


def test_refused_before_it_trains(scans):
    """What the end would refuse is refused at the start: files of others, a split that is not there."""
    (scans / "taken").mkdir()
    for name in "ab":
        (scans / f"taken/{name}.npy").write_bytes(b"precious")
    done = run("denoise", "in", "--out", "taken", cwd=scans)
    assert done.returncode == 2 and "a.npy exists already, and is not of this run: --force" in done.stderr
    assert not list((scans / "taken/diffdenoise").glob("*.h5")) and (scans / "taken/a.npy").read_bytes() == b"precious"
    ok("data", "import", "in", "--split", "train", "--out", "train.h5", cwd=scans)
    for stage in ("bsn", "distill --target recorrupted", "experiments.baselines --method nei2nei"):
        done = run(*stage.split(), *"--data train.h5 --split val --model no.pt --out no.h5".split(), cwd=scans)
        assert done.returncode == 2 and "train.h5 has no volume of split 'val'" in done.stderr
        assert not list(scans.glob("no.*"))


def test_samples_beside_the_files(scans):
    """Pairs whose mean is the denoised image, in its units, with detail of their own; not of the recipe paper."""
    ok("denoise", "in", "--instant", "--samples", 2, "--out", "drawn", cwd=scans)
    x, *pair = np.load(scans / "drawn/a.npy"), *(tifffile.imread(scans / f"drawn/a.npy_sample{k}.tif") for k in (1, 2))
    np.testing.assert_allclose(sum(pair) / 2, x, atol=0.1)
    assert 5 < np.std(pair[0] - x) < 50  # the noise has 50
    image = nibabel.Nifti1Image(np.load(scans / "in/a.npy").T.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(-0.5, 300)
    nibabel.save(image, scans / "scaled.nii.gz")
    student = "drawn/diffdenoise/student.pt"
    ok("denoise", "scaled.nii.gz", "--samples", 2, "--model", student, "--out", "nifti", cwd=scans)
    names = ["scaled.nii.gz", *(f"scaled.nii.gz_sample{k}.nii" for k in (1, 2))]
    x, *pair = (nibabel.load(scans / "nifti" / name).get_fdata() for name in names)
    np.testing.assert_allclose(sum(pair) / 2, x, atol=0.5)
    assert x.mean() < 300 and np.std(pair[0] - x) > 2


def test_images_stored_as_jpeg(tmp_path):
    """No noise model holds for them, from which to learn: the shipped network denoises them, and nothing is trained."""
    rng = np.random.default_rng(1)
    (tmp_path / "in").mkdir()
    for k, image in enumerate(phantom(6, 256)):
        y = np.clip(255 * image + 9 * rng.standard_normal(image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(y).save(tmp_path / f"in/{k}.jpg", quality=75)
    done = ok("denoise", "in", "--out", "out", cwd=tmp_path)
    assert "stored as JPEG: no noise model holds" in done.stdout and (tmp_path / "out/3.jpg.png").exists()
    assert not (tmp_path / "out/diffdenoise/tuned.pt").exists()


def test_left_alone_after_dividing(scans, monkeypatch):
    """Images whose noise was found to be uneven, but which no network may touch, come out as they came."""
    monkeypatch.setattr(denoise, "LAWLESS", -1)
    monkeypatch.setattr(denoise, "UNEVEN", {0: 0.0, 2: 0.0})
    monkeypatch.setattr(denoise, "MAPPED", 0.0)
    done = ok("denoise", "in", "--instant", "--out", "alone", cwd=scans)
    assert "divided by its map" in done.stdout and "images as they are" in done.stdout
    for name in "ab":
        np.testing.assert_array_equal(np.load(scans / f"alone/{name}.npy"), np.load(scans / f"in/{name}.npy"))
