"""Whatever happens: killed runs, damaged files, a full disk. Prints what results/robustness.md reports.

    python -m experiments.robustness kill 200      # SIGKILL at random moments of a run, then the same command again
    python -m experiments.robustness mutate 1000   # files of every format with damaged bytes, beside good ones
    python -m experiments.robustness full 20       # disks (tmpfs; needs root) that fill up at random moments

The run is denoise.py from files to files with a few training steps for each stage; the files are made on the spot.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import tifffile
from PIL import Image

import data
import distill
import noise
from lib import files

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # the tests make DICOM and fastMRI files; they import each other by plain names
from test_formats import ENCODERS, compressed_dicom, dicom, fastmri
from test_measure import phantom

EFFORT = ["--effort", "0.003", "--precision", "float32"]
QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_inputs(folder, side=192):
    """Files of every format, noisy ellipses of `side` pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = np.stack([noise.add(x, "gaussian", 12 / 255, 0, rng) for x in phantom(6, side)])
    grey = np.clip(200 * images + 20, 0, 255).astype(np.uint8)
    many = np.clip(3000 * images + 300, 0, 4095).astype(np.uint16)
    for s in range(3):
        dicom(folder / f"slice{s}.dcm", many[s], s)
    dicom(folder / "packed.dcm", many[3], 7, SeriesInstanceUID="1.7", syntax="1.2.840.10008.1.2.5")
    for k, syntax in enumerate(ENCODERS):
        pixels = grey[2] if k == 3 else many[2]
        compressed_dicom(folder / f"compressed{k}.dcm", pixels, syntax, 10 + k, SeriesInstanceUID=f"1.8.{k}")
    nibabel.save(nibabel.Nifti1Image(many[:2].T.astype(np.int16), np.eye(4)), folder / "head.nii.gz")
    nibabel.save(nibabel.Nifti1Image(images[:1].T, np.eye(4)), folder / "flat.nii")
    tifffile.imwrite(folder / "stack.tif", many[:2], compression="zlib")
    Image.fromarray(grey[0]).save(folder / "a.png")
    Image.fromarray(grey[1]).save(folder / "b.jpg")
    np.save(folder / "c.npy", images[:1])
    np.savez_compressed(folder / "d.npz", x=many[0])
    fastmri(folder / "file_AXT2_1.h5", images[:1])


def command(sources, out, *flags):
    """denoise.py with a checkpoint every fifth of a second, so that a killed training can be resumed."""
    code = "import sys, denoise; from lib import runtime, training; training.SAVE_EVERY = 0.2; "
    code += "sys.argv[0] = 'denoise.py'; runtime.command(denoise.main)"
    return [sys.executable, "-c", code, *map(str, sources), "--out", str(out), *map(str, flags)]


def run(*arguments, timeout=None):
    """Runs `command` to its end; returns it with its output as text."""
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def crashed(done, allowed=(0, 1)):
    """Whether a run ended with a traceback or with another exit code than those; prints what it said."""
    if done.returncode in allowed and "Traceback" not in done.stderr:
        return False
    print(done.returncode, done.stderr[-2000:], flush=True)
    return True


def outputs(out):
    """{name: digest} of the files that have their final names."""
    found = (p for p in out.rglob("*") if p.is_file() and "diffdenoise" not in p.parts and p.suffix != ".tmp")
    return {str(p.relative_to(out)): files.digest([p]) for p in found}


def reference(source, out, *flags):
    """(outputs, seconds) of a run that nobody disturbs."""
    began = time.monotonic()
    done = run([source], out, *flags)
    assert done.returncode == 0, done.stderr
    return outputs(out), time.monotonic() - began


def kill(folder, count):
    make_inputs(folder / "in")
    for path in (folder / "in").iterdir():  # few files: most moments fall into the training, some into the writing
        if path.name not in ("slice0.dcm", "slice1.dcm", "slice2.dcm", "head.nii.gz", "a.png", "c.npy"):
            path.unlink()
    expected, seconds = reference(folder / "in", folder / "reference", *EFFORT)
    print(f"{len(expected)} files; an uninterrupted run takes {seconds:.0f} s", flush=True)
    kills = runs = broken = differing = 0
    rng, out = random.Random(0), folder / "out"
    while kills < count:
        shutil.rmtree(out, ignore_errors=True)
        code = None
        while code is None:
            process = subprocess.Popen(command([folder / "in"], out, *EFFORT), cwd=ROOT, **QUIET)
            try:
                code = process.wait(rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                broken += sum(expected.get(name) != digest for name, digest in outputs(out).items())
        differing += code != 0 or outputs(out) != expected
        runs += 1
        print(f"{kills} kills, {runs} runs that ended: {broken} broken files, {differing} that differ", flush=True)


def damage(raw, rng):
    """The bytes of a file, cut short, with a stretch of zeros, or with wrong bytes anywhere or in the header."""
    raw, how = bytearray(raw), rng.randrange(4)
    if how == 0:
        return raw[: rng.randrange(len(raw))]
    if how == 1:  # as a half-copied file has
        start = rng.randrange(len(raw))
        end = min(len(raw), start + rng.randrange(1, 4096))
        raw[start:end] = b"\0" * (end - start)
        return raw
    for _ in range(rng.choice((1, 3, 20))):
        raw[rng.randrange(len(raw) if how == 2 else min(len(raw), 400))] = rng.randrange(256)
    return raw


def mutate(folder, count):
    make_inputs(folder / "good", 64)
    rng, base = random.Random(0), sorted((folder / "good").iterdir())
    flags = ["--model", tiny_student(folder)]
    reference(folder / "good", folder / "first", *flags)
    expected, alone = reference(folder / "good", folder / "reference", *flags)
    refused = written = crashes = slow = lost = 0
    for batch in range(0, count, 50):
        source, out = folder / f"in{batch}", folder / f"out{batch}"
        for k in range(batch, min(batch + 50, count)):
            original = base[k % len(base)]
            (source / str(k)).mkdir(parents=True)
            (source / str(k) / original.name).write_bytes(damage(original.read_bytes(), rng))
        began = time.monotonic()
        try:
            done = run([source, folder / "good"], out, *flags, timeout=500)
        except subprocess.TimeoutExpired:
            slow += 1
            continue
        slow += time.monotonic() - began > 2 * alone + 10
        crashes += crashed(done)
        refused += done.stderr.count("left out")
        good = {name: digest for name, digest in outputs(out).items() if "/" not in name}
        lost += len(expected.keys() - good.keys()) + sum(expected[name] != good[name] for name in good)
        written += len(outputs(out)) - len(good)
        shutil.rmtree(source), shutil.rmtree(out)
        print(f"{min(batch + 50, count)} damaged files: {refused} refused in a line, {written} written,", end=" ")
        print(f"{crashes} runs with a traceback or crash, {slow} that hung for 10 s,", end=" ")
        print(f"{lost} of the good files lost or changed", flush=True)


def tiny_student(folder):
    """A student of a few steps."""
    dataset, student = folder / "x.h5", folder / "s.pt"
    data.main(["import", str(folder / "good" / "stack.tif"), "--split", "train", "--out", str(dataset)])
    flags = ["--target", "recorrupted", "--noise", "gaussian:0.05", "--steps", "3", "--crop", "32"]
    distill.main(["--data", str(dataset), *flags, "--model", str(student), "--out", str(folder / "y.h5")])
    return student


def full(folder, count):
    make_inputs(folder / "in")
    expected, _ = reference(folder / "in", folder / "reference", *EFFORT)
    needed = sum(p.stat().st_size for p in (folder / "reference").rglob("*") if p.is_file())
    print(f"{len(expected)} files; a run leaves {needed / 1e6:.1f} MB behind", flush=True)
    corrupt = crashes = ended = wrong = 0
    rng, disk = random.Random(0), folder / "disk"
    disk.mkdir()
    for k in range(count):
        size = int(rng.uniform(0.01, 1.0) * needed) // 4096 * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        try:
            done = run([folder / "in"], disk / "out", *EFFORT)
            crashes += crashed(done, (0, 1, 2))
            corrupt += sum(expected.get(name) != digest for name, digest in outputs(disk / "out").items())
            said = (done.stderr.strip().splitlines() or ["-"])[-1]
            subprocess.run(["mount", "-o", f"remount,size={4 * needed}", str(disk)], check=True)
            ended += run([folder / "in"], disk / "out", *EFFORT).returncode == 0
            wrong += outputs(disk / "out") != expected
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        print(f"disk {k + 1}, {size / 1e6:.1f} MB, exit code {done.returncode}: {said[:150]}")
        print(f"  so far {corrupt} corrupt files, {crashes} tracebacks;", end=" ")
        print(f"with room again {ended} ended well, {wrong} results that differ", flush=True)


if __name__ == "__main__":
    what, count = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        {"kill": kill, "mutate": mutate, "full": full}[what](Path(folder), count)
