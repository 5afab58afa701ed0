"""What denoise.py writes beside and into the images (BIDS, DICOM, removed, JSON lines), and runs over many files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pydicom
import pydicom.data
import pytest
import tifffile
from conftest import ROOT, command, ok, run
from test_files import contents
from test_formats import dicom

from lib import apply, files, formats, record, runtime
from lib.formats import bids
from lib.formats import dicom as dicom_format

RNG = np.random.default_rng(0)
VALIDATOR = files.Path(sys.executable).with_name("bids-validator-deno")


@pytest.fixture
def arrays(tmp_path):
    """Nine small images."""
    (tmp_path / "in").mkdir()
    for k in range(9):
        np.save(tmp_path / "in" / f"{k}.npy", np.random.default_rng(k).integers(0, 1000, (24, 20)).astype(np.uint16))
    return tmp_path


def nifti(path, shape=(20, 24, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(RNG.integers(0, 900, shape).astype(np.int16), np.eye(4)), path)


@pytest.fixture
def dataset(tmp_path):
    """A BIDS dataset: a T1w with JSON beside it, a 4D bold whose JSON stands above, and what is not to be denoised."""
    root = tmp_path / "raw"
    nifti(root / "sub-01/ses-x/anat/sub-01_ses-x_T1w.nii.gz")
    nifti(root / "sub-02/func/sub-02_task-rest_run-1_bold.nii.gz", (20, 24, 4, 3))
    nifti(root / "sub-02/fmap/sub-02_phasediff.nii.gz")
    nifti(root / "sub-02/anat/scan.nii")
    nifti(root / "derivatives/other/sub-01/anat/sub-01_desc-other_T1w.nii.gz")
    said = {
        "dataset_description.json": dict(Name="Two heads", BIDSVersion="1.10.0", DatasetType="raw", License="CC0"),
        "task-rest_bold.json": dict(TaskName="rest", RepetitionTime=1.0, EchoTime=0.03),
        "sub-02/func/sub-02_task-rest_run-1_bold.json": dict(EchoTime=0.05),
        "sub-01/ses-x/anat/sub-01_ses-x_T1w.json": dict(MagneticFieldStrength=3, FlipAngle=9),
    }
    for name, content in said.items():
        (root / name).write_text(json.dumps(content))
    (root / "README.md").write_text("Made by a test. " * 20)
    return tmp_path


def test_bids(dataset, made):
    """Names, sidecars with what the dataset says of the input, links that lead back to it; the rest in a line each."""
    out = dataset / "raw/derivatives/diffdenoise"
    done = run("denoise", "raw", "--bids", "--removed", "--out", out, "--model", made / "student.pt", cwd=dataset)
    assert done.returncode == 1 and "2 files written" in done.stdout and done.stderr.count("left out") == 2, done.stderr
    assert "scan.nii is not named as BIDS" in done.stderr and "phasediff.nii.gz is left alone" in done.stderr
    anat, func = "sub-01/ses-x/anat/sub-01_ses-x_desc-", "sub-02/func/sub-02_task-rest_run-1_desc-"
    made_of = {f"{anat}{what}_T1w{end}" for what, end in (("denoised", ".nii.gz"), ("removed", ".nii.gz"))}
    made_of |= {f"{func}{what}_bold.nii.gz" for what in ("denoised", "removed")}
    made_of |= {name.replace(".nii.gz", ".json") for name in made_of} | {
        "dataset_description.json",
        ".bidsignore",
        "report.html",
    }
    assert {name for name in contents(out) if "diffdenoise" not in name} == made_of
    names = f"{anat}denoised_T1w.json", f"{func}denoised_bold.json"
    t1, bold = (json.loads((out / name).read_text()) for name in names)
    assert json.loads((out / f"{anat}removed_T1w.json").read_text())["Description"].startswith("What was taken")
    assert t1["FlipAngle"] == 9 and t1["Sources"] == ["bids:raw:sub-01/ses-x/anat/sub-01_ses-x_T1w.nii.gz"]
    assert (bold["TaskName"], bold["RepetitionTime"], bold["EchoTime"]) == ("rest", 1.0, 0.05)
    assert "student" in t1["Method"] and t1["Parameters"] == {"Ensemble": 1} and t1["SkullStripped"] is False
    about = json.loads((out / "dataset_description.json").read_text())
    link = out / about["DatasetLinks"]["raw"]
    assert about["DatasetType"] == "derivative" and (link / t1["Sources"][0].split(":", 2)[2]).exists()
    before = contents(out)
    again = run("denoise", "raw", "--bids", "--removed", "--out", out, "--model", made / "student.pt", cwd=dataset)
    assert "2 were there already" in again.stdout and contents(out) == before
    done = run("denoise", "raw/sub-01", "--bids", "--out", "raw", "--model", made / "student.pt", cwd=dataset)
    assert done.returncode == 2 and "--out raw is another dataset" in done.stderr


def test_bids_names():
    """A derivative of a derivative keeps its desc; what follows from the names alone."""

    def name(path, what="denoised"):
        return str(bids.output(formats.Item("nifti", (files.Path(path),), files.Path("ds")), "out", what))

    assert name("ds/sub-1/anat/sub-1_desc-mean_T2w.nii") == "out/sub-1/anat/sub-1_desc-meanDenoised_T2w.nii"
    assert name("x/dwi/sub-1_dir-AP_dwi.nii.gz", "noise-map") == "out/sub-1/dwi/sub-1_dir-AP_desc-noisemap_dwi.nii.gz"
    for path, says in (("ds/anat/sub_T1w.nii", "not named"), ("ds/sub-1/sub-1_T1w.nii", "does not lie in a folder")):
        with pytest.raises(ValueError, match=says):
            name(path)
    with pytest.raises(ValueError, match="phases"):
        name("ds/sub-1/func/sub-1_part-phase_bold.nii.gz")


@pytest.mark.skipif(not VALIDATOR.exists(), reason="needs bids-validator-deno: pip install it")
def test_bids_validator_finds_no_error(dataset, made):
    run("denoise", "raw", "--bids", "--removed", "--out", "out", "--model", made / "student.pt", cwd=dataset)
    said = subprocess.run([VALIDATOR, "--json", "out"], cwd=dataset, capture_output=True, text=True)
    found = json.loads(said.stdout)["issues"]["issues"]
    assert not [issue for issue in found if issue["severity"] == "error"], found


@pytest.mark.parametrize(
    "before, after",
    [
        (dict(SeriesDescription="T1 MPRAGE", SeriesNumber=7), ("T1 MPRAGE denoised", 1007)),
        (dict(SeriesDescription="x" * 64, SeriesNumber=2**31 - 1), ("x" * 55 + " denoised", 2**31 - 1001)),
        (dict(), ("denoised", 1000)),
    ],
)
def test_dicom_series_has_a_name_and_number_of_its_own(tmp_path, before, after):
    pixels = RNG.integers(0, 4000, (20, 24)).astype(np.uint16)
    dicom(tmp_path / "a.dcm", pixels, **before)
    item = formats.Item("dicom", (tmp_path / "a.dcm",), tmp_path)
    for name in ("b.dcm", "c.dcm"):
        dicom_format.write(item, [pixels[None]], [tmp_path / name], "a test")
    made = pydicom.dcmread(tmp_path / "b.dcm")
    assert (made.SeriesDescription, int(made.SeriesNumber)) == after
    assert (tmp_path / "b.dcm").read_bytes() == (tmp_path / "c.dcm").read_bytes()


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs dciodvfy: Debian's dicom3tools")
@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "JPEG2000.dcm"])
def test_dciodvfy_finds_no_error_that_the_input_lacks(tmp_path, name):
    """CT, MR, and nuclear medicine, from pydicom's wheel."""
    path = files.Path(pydicom.data.get_testdata_file(name, download=False))
    item = formats.Item("dicom", (path,), path.parent)
    dicom_format.write(item, [formats.read(item)[0].slices], [tmp_path / name], "a test")
    before, after = (
        {line for line in done.stderr.splitlines() if line.startswith("Error")}
        for done in (subprocess.run(["dciodvfy", p], capture_output=True, text=True) for p in (path, tmp_path / name))
    )
    assert after <= before


def test_removed(tmp_path):
    """Denoised and removed add up to what was read: with clipping, padding and NaN; in the units of a NIfTI viewer."""
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = RNG.integers(0, 4096, (2, 20, 24)).astype(np.uint16)
    pixels[:, :3] = 0
    for s in range(2):
        dicom(folder / f"{s}.dcm", pixels[s], s, PixelPaddingValue=0)
    values = RNG.standard_normal((20, 24))
    values[0] = np.nan
    np.save(folder / "a.npy", values)
    nifti(folder / "b.nii")
    raw = bytearray((folder / "b.nii").read_bytes())
    raw[112:120] = np.array([-2.5, 7], "<f4").tobytes()
    (folder / "b.nii").write_bytes(raw)
    jobs, problems = files.plan([folder], tmp_path / "out", sides=["removed"])
    (tmp_path / "work").mkdir()
    apply.denoise_files(jobs, lambda y: y * 1.5 - 0.1, "a test", tmp_path / "work", problems)
    out = tmp_path / "out"
    denoised = np.stack([pydicom.dcmread(out / f"{s}.dcm").pixel_array for s in range(2)])
    removed = tifffile.imread(out / "0.dcm_removed.tif")
    assert not problems and np.array_equal(denoised + removed, pixels) and denoised.max() == 4095
    assert (removed[:, :3] == 0).all() and (removed[:, 3:] != 0).any()
    got = tifffile.imread(out / "a.npy_removed.tif")[0]
    assert (got[0] == 0).all() and np.allclose(got[1:], values[1:] - np.load(out / "a.npy")[1:], atol=1e-6)
    three = folder / "b.nii", out / "b.nii", out / "b.nii_removed.nii"
    before, after, less = (nibabel.load(path).get_fdata() for path in three)
    assert np.allclose(after + less, before) and np.abs(less).max() > 1


def test_json_lines(arrays, made):
    """One line for each file, whatever became of it, and nothing else on stdout."""
    (arrays / "in/some notes.txt").write_text("no image")
    np.save(arrays / "in/colour.npy", np.zeros((2, 3, 20, 20)))
    for s in range(2):
        dicom(arrays / "in" / f"{s}.dcm", RNG.integers(0, 4000, (20, 24)).astype(np.uint16), s)
    (arrays / "in/1.dcm").write_bytes((arrays / "in/1.dcm").read_bytes()[:-100])
    flags = ["in", "--out", "out", "--removed", "--json", "--model", made / "student.pt"]
    done = run("denoise", *flags, cwd=arrays)
    lines = {line["input"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1 and len(lines) == 13 == done.stdout.count("\n") and "10 files written" in done.stderr
    assert lines["in/0.npy"]["outputs"] == ["out/0.npy", "out/0.npy_removed.tif"] and lines["in/0.npy"]["seconds"] > 0
    names = ("3.npy", "0.dcm", "1.dcm", "colour.npy", "some notes.txt")
    states = {name: lines[f"in/{name}"]["status"] for name in names}
    assert states == dict(zip(states, ["written", "written", *["left out"] * 3]))
    assert "not grey slices" in lines["in/colour.npy"]["reason"] and lines["in/3.npy"]["reason"] is None
    again = run("denoise", *flags, cwd=arrays)
    kept = [json.loads(line) for line in again.stdout.splitlines()]
    assert sum(line["status"] == "kept" for line in kept) == 9 and kept[0]["outputs"]


def test_shares_make_what_one_process_makes(arrays, made):
    """Each share its own files, in any order; then a run over all finds everything there; the lines of wrong use."""
    model = ["--model", made / "student.pt"]
    ok("denoise", "in", "--out", "one", *model, cwd=arrays)
    (arrays / "in/notes.txt").write_text("no image")
    said = [run("denoise", "in", "--out", "out", "--share", f"{k}/4", *model, cwd=arrays) for k in (3, 1, 4, 2)]
    assert [done.returncode for done in said] == [0, 1, 0, 0] and "2 files written" in said[0].stdout
    images = {name: raw for name, raw in contents(arrays / "one").items() if name.endswith(".npy")}
    made_there = contents(arrays / "out")
    assert len(images) == 9 and images == {name: made_there[name] for name in images}
    assert "9 were there already" in run("denoise", "in", "--out", "out", *model, cwd=arrays).stdout
    for flags, says in (("5/4", "--share 5/4: give K/N"), ("0/4", "give K/N"), ("half", "give K/N")):
        refused = run("denoise", "in", "--out", "no", "--share", flags, *model, cwd=arrays)
        assert refused.returncode == 2 and says in refused.stderr and not (arrays / "no").exists()
    alone = run("denoise", "in", "--out", "no", "--share", "1/2", cwd=arrays)
    assert alone.returncode == 2 and "training with several is for the stages" in alone.stderr


def test_torchrun_shares_the_files(arrays, made):
    """Two processes: the same bytes, one line of totals over both, and an exit code for both."""
    ok("denoise", "in", "--out", "one", "--model", made / "student.pt", cwd=arrays)
    np.save(arrays / "in/5.npy", np.zeros((2, 3, 20, 20)))  # one that the second process cannot do
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*launch, *command("denoise", "in", "--out", "two", "--model", made / "student.pt")[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=arrays, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 1 and done.stdout.count("files written") == 1, done.stderr
    assert "8 files written to two, 0 were there already, 1 left out" in done.stdout and "in/5.npy" in done.stderr
    one, two = contents(arrays / "one"), contents(arrays / "two")
    assert all(one[f"{k}.npy"] == two[f"{k}.npy"] for k in range(9) if k != 5)


def test_log_survives_a_torn_line_and_tells_the_latest(tmp_path):
    done = {}
    record.add(tmp_path, (0, 1), done, "a", "m", False)
    record.add(tmp_path, (0, 1), done, "a", "m", True)
    with open(tmp_path / "files.jsonl", "ab") as file:
        file.write(b'{"name": "b", "ma')  # killed here
    assert record.read(tmp_path) == {"a": dict(mark="m", whole=True, turn=2)}
    record.add(tmp_path, (0, 1), done, "c", "m", True)
    other = record.read(tmp_path)
    assert other.keys() == {"a", "c"}
    record.add(tmp_path, (1, 2), other, "a", "new", True)  # by a share, whose log comes first by name
    assert record.read(tmp_path)["a"]["mark"] == "new"
    back = record.read(tmp_path)
    record.add(tmp_path, (0, 1), back, "a", "m", False)
    assert record.read(tmp_path)["a"] == dict(mark="m", whole=False, turn=4)


def test_a_second_run_on_the_same_output_is_refused(arrays, made):
    """Also by a share, and a share by itself, but not by another share; a killed run leaves no lock."""
    flags = ["in", "--out", "out", "--model", made / "student.pt"]
    with record.lock(arrays / "out/diffdenoise"):
        for more in ([], ["--share", "1/2"]):
            done = run("denoise", *flags, *more, cwd=arrays)
            assert done.returncode == 2 and "another run is writing to" in done.stderr and done.stderr.count("\n") == 1
    with record.lock(arrays / "out/diffdenoise", (0, 2)):
        assert run("denoise", *flags, "--share", "1/2", cwd=arrays).returncode == 2
        assert run("denoise", *flags, cwd=arrays).returncode == 2
        ok("denoise", *flags, "--share", "2/2", cwd=arrays)
    code = "import os; from lib import record, files; "
    code += f"held = record.lock(files.Path({str(arrays / 'out/diffdenoise')!r})); held.__enter__()"
    subprocess.run([sys.executable, "-c", f"{code}; os.kill(os.getpid(), 9)"], cwd=ROOT)
    ok("denoise", *flags, cwd=arrays)


def test_read_only_and_full(arrays, made, monkeypatch):
    """One line each that says what to do; a full disk ends the run, and the next one does what is left."""
    flags = ["in", "--out", "out", "--model", made / "student.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        done = run("denoise", *flags, cwd=arrays)
    assert done.returncode == 2 and "is read-only: give another folder" in done.stderr and done.stderr.count("\n") == 1
    with monkeypatch.context() as patch:  # numpy's own words
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError("960 requested and 0 written")))
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        done = run("denoise", *flags, cwd=arrays)
    assert "No space left on device; 9 left to do" in done.stderr and done.stderr.count("\n") == 1
    real, count = os.replace, []

    def full(a, b):
        count.append(b)
        if len(count) > 4:
            raise OSError(28, "No space left on device")
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        done = run("denoise", *flags, cwd=arrays)
    assert done.returncode == 1 and "4 files written" in done.stdout and done.stderr.count("\n") == 2  # and the page
    assert "No space left on device; 5 left to do: make room, then run this again" in done.stderr
    assert "5 files written to out, 4 were there already, 0 left out" in ok("denoise", *flags, cwd=arrays).stdout
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(runtime.sys, "argv", ["bsn.py"])
        runtime.command(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))


def test_an_unreadable_input_is_left_out(arrays, made, monkeypatch):
    real = files.digest

    def digest(paths):
        if paths[0].name == "3.npy":
            raise PermissionError(13, "Permission denied", str(paths[0]))
        return real(paths)

    monkeypatch.setattr(files, "digest", digest)
    done = run("denoise", "in", "--out", "out", "--model", made / "student.pt", cwd=arrays)
    assert done.returncode == 1 and "8 files written" in done.stdout
    assert "left out: in/3.npy cannot be read: Permission denied" in done.stderr


def test_ctrl_c(tmp_path):
    """Once: the file is finished, the next run goes on and ends with the same bytes. Twice: gone, without a word."""
    (tmp_path / "in").mkdir()
    for k in range(6):
        np.save(tmp_path / "in" / f"{k}.npy", np.random.default_rng(k).random((20, 24)))
    code = "import sys, time; from lib import apply, files, record, runtime\n"
    code += "jobs, problems = files.plan(['in'], files.Path('out'))\n"
    code += "with record.lock(files.Path('out/w')), runtime.stoppable('this file') as stop:\n"
    code += "    slow = lambda y: (print('at it', flush=True), time.sleep(float(sys.argv[1])), y + 0.1)[2]\n"
    code += (
        "    counts = apply.denoise_files(jobs, slow, 'm', files.Path('out/w'), problems, run=apply.Run(stop=stop))\n"
    )
    code += "sys.exit(record.finish('out', *counts, problems, stop, record.teller(None)))"

    def start(seconds):
        argv, env = [sys.executable, "-c", code, str(seconds)], {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process = subprocess.Popen(argv, cwd=tmp_path, env=env, text=True, **pipes)
        assert process.stdout.readline() == "at it\n"
        return process

    process = start(1)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "1 files written" in said and "Traceback" not in errors
    assert "stopping after this file" in errors and "stopped; the same command goes on" in errors
    process, began = start(600), time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "stopping" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read() == "" and time.monotonic() - began < 60
    process = start(0)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "5 files written to out, 1 were there already" in said
    jobs, problems = files.plan([tmp_path / "in"], tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    apply.denoise_files(jobs, lambda y: y + 0.1, "m", tmp_path / "whole", problems)
    assert all((tmp_path / f"out/{k}.npy").read_bytes() == (tmp_path / f"whole/{k}.npy").read_bytes() for k in range(6))
    assert not list(tmp_path.rglob("*.tmp"))
