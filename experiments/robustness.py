"""Whatever happens: killed runs, damaged files, a full disk. Prints what results/robustness.md reports.

    python results/robustness.py kill 200          # SIGKILL at random moments of a whole run, then started again
    python results/robustness.py mutate 1000       # files of every format with damaged bytes, beside good ones
    python results/robustness.py full 20           # disks (tmpfs; needs root) that fill up at random moments

The run is denoise.py from files to files with a few training steps a stage; the files are made on the spot.
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

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_formats import ENCODERS, compressed_dicom, dicom, fastmri
from test_measure import phantom

import apply
import noise

EFFORT = ["--effort", "0.003", "--precision", "float32"]


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
    """denoise.py with a checkpoint every fifth of a second, so that a killed training has one to go on from."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import runtime, denoise; runtime.SAVE_EVERY = 0.2; "
    code += "sys.argv[0] = 'denoise.py'; runtime.command(denoise.main)"
    return [sys.executable, "-c", code, *map(str, sources), "--out", str(out), *flags]


def outputs(out):
    """{name: digest} of what stands under final names."""
    found = (p for p in out.rglob("*") if p.is_file() and "diffdenoise" not in p.parts and p.suffix != ".tmp")
    return {str(p.relative_to(out)): apply.digest([p]) for p in found}


def reference(folder):
    started = time.monotonic()
    done = subprocess.run(command([folder / "in"], folder / "whole", *EFFORT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return outputs(folder / "whole"), time.monotonic() - started


def kill(folder, count):
    make_inputs(folder / "in")
    for path in (folder / "in").iterdir():  # few files: most moments lie in the training, some in the writing
        if path.name not in ("slice0.dcm", "slice1.dcm", "slice2.dcm", "head.nii.gz", "a.png", "c.npy"):
            path.unlink()
    whole, seconds = reference(folder)
    print(f"{len(whole)} files; an uninterrupted run takes {seconds:.0f} s", flush=True)
    kills = runs = broken = differing = 0
    rng = random.Random(0)
    while kills < count:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        while True:
            process = subprocess.Popen(command([folder / "in"], out, *EFFORT), stdout=-3, stderr=-3)
            try:
                code = process.wait(rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                broken += sum(whole.get(name) != mark for name, mark in outputs(out).items())
                continue
            differing += code != 0 or outputs(out) != whole
            runs += 1
            break
        print(
            f"{kills} kills, {runs} runs that ended: {broken} broken files, {differing} differing results", flush=True
        )


def mutate(folder, count):
    make_inputs(folder / "good", 64)
    rng = random.Random(0)
    student = tiny_student(folder)
    base = sorted((folder / "good").iterdir())
    whole = outputs_of(folder / "good", folder / "whole", student)
    started = time.monotonic()
    whole = outputs_of(folder / "good", folder / "again", student)
    alone = time.monotonic() - started
    refused = written = tracebacks = slow = lost = 0
    for batch in range(0, count, 50):
        source, out = folder / f"in{batch}", folder / f"out{batch}"
        for k in range(batch, min(batch + 50, count)):
            original = base[k % len(base)]
            raw = bytearray(original.read_bytes())
            how = rng.randrange(4)
            if how == 0:  # cut short
                raw = raw[: rng.randrange(len(raw))]
            elif how == 1:  # a stretch of zeros, as a half-copied file has
                start = rng.randrange(len(raw))
                end = min(len(raw), start + rng.randrange(1, 4096))
                raw[start:end] = b"\0" * (end - start)
            else:  # wrong bytes; half of the time in the header
                for _ in range(rng.choice((1, 3, 20))):
                    raw[rng.randrange(len(raw) if how == 2 else min(len(raw), 400))] = rng.randrange(256)
            (source / str(k)).mkdir(parents=True)
            (source / str(k) / original.name).write_bytes(raw)
        started = time.monotonic()
        flags = ["--model", str(student)]
        try:
            done = subprocess.run(
                command([source, folder / "good"], out, *flags), capture_output=True, text=True, timeout=500
            )
        except subprocess.TimeoutExpired:
            slow += 1
            continue
        slow += time.monotonic() - started > 2 * alone + 10
        bad = done.returncode not in (0, 1) or "Traceback" in done.stderr
        tracebacks += bad
        if bad:
            print(done.returncode, done.stderr[-2000:], flush=True)
        refused += done.stderr.count("left out")
        good = {name: mark for name, mark in outputs(out).items() if "/" not in name}
        lost += len(whole.keys() - good.keys()) + sum(whole[n] != good[n] for n in good)
        written += len(outputs(out)) - len(good)
        shutil.rmtree(source), shutil.rmtree(out)
        print(
            f"{min(batch + 50, count)} damaged files: {refused} refused in a line, {written} written, {tracebacks} "
            f"runs with a traceback or crash, {slow} runs that hung for 10 s, {lost} of the good files lost or changed",
            flush=True,
        )


def outputs_of(source, out, student):
    subprocess.run(command([source], out, "--model", str(student)), check=True, stdout=-3, stderr=-3)
    return outputs(out)


def tiny_student(folder):
    """A student of a few steps."""
    for script, *flags in (
        ("data", "import", folder / "good" / "stack.tif", "--out", folder / "x.h5", "--split", "train"),
        ("distill", "--data", folder / "x.h5", "--target", "recorrupted", "--noise", "gaussian:0.05", "--steps", 3)
        + ("--crop", 32, "--model", folder / "s.pt", "--out", folder / "y.h5"),
    ):
        argv = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
        subprocess.run(argv, check=True, stdout=-3, stderr=-3)
    return folder / "s.pt"


def full(folder, count):
    make_inputs(folder / "in")
    whole, _ = reference(folder)
    needed = sum(p.stat().st_size for p in (folder / "whole").rglob("*") if p.is_file())
    print(f"{len(whole)} files; a run leaves {needed / 1e6:.1f} MB behind", flush=True)
    rng, corrupt, tracebacks, ended, wrong = random.Random(0), 0, 0, 0, 0
    disk = folder / "disk"
    disk.mkdir()
    for k in range(count):
        size = int(rng.uniform(0.01, 1.0) * needed) // 4096 * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        try:
            done = subprocess.run(command([folder / "in"], disk / "out", *EFFORT), capture_output=True, text=True)
            tracebacks += done.returncode not in (0, 1, 2) or "Traceback" in done.stderr
            if "Traceback" in done.stderr:
                print(done.stderr[-2000:], flush=True)
            corrupt += sum(whole.get(name) != mark for name, mark in outputs(disk / "out").items())
            said = (done.stderr.strip().splitlines() or ["-"])[-1]
            subprocess.run(["mount", "-o", f"remount,size={4 * needed}", str(disk)], check=True)
            again = subprocess.run(command([folder / "in"], disk / "out", *EFFORT), capture_output=True, text=True)
            ended += again.returncode == 0
            wrong += outputs(disk / "out") != whole
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        print(
            f"disk {k + 1}, {size / 1e6:.1f} MB, exit code {done.returncode}: {said[:150]}\n  so far {corrupt} corrupt "
            f"files, {tracebacks} tracebacks; with room again {ended} ended well, {wrong} results that differ",
            flush=True,
        )


if __name__ == "__main__":
    what, count = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        {"kill": kill, "mutate": mutate, "full": full}[what](Path(folder), count)
