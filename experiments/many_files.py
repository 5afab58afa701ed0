"""Thousands of small files: memory, time, and runs that are killed. Prints what results/many_files.md reports.

    python -m experiments.many_files                                # 10,000 .npy files of 32x32, on Linux
    python -m experiments.many_files --count 500 --kills 3

The student is the one of `denoise.py --instant` on ten like them of 256x256. Memory is the resident memory of the
process (VmRSS), read every half second while it runs.
"""

import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lib import files, record, runtime

ROOT = Path(__file__).parent.parent
SIDE = 32


def make(folder, count, side):
    """Noisy blobs of side x side pixels, 16 bits."""
    folder.mkdir()
    y, x = np.mgrid[:side, :side] / side
    for k in range(count):
        rng = np.random.default_rng(k)
        image = sum(np.exp(-30 * ((y - a) ** 2 + (x - b) ** 2)) for a, b in rng.random((4, 2)))
        noisy = 1000 * image + 50 * rng.standard_normal((side, side)) + 300
        np.save(folder / f"{k:05d}.npy", noisy.astype(np.uint16))


def start(folder, *flags):
    argv = [sys.executable, str(ROOT / "denoise.py"), *map(str, flags)]
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finished(out):
    """How many files are written whole, by the lines of the log."""
    log = out / "diffdenoise/files.jsonl"
    return log.read_bytes().count(b'"whole": true') if log.exists() else 0


def watch(process, out):
    """[(seconds, files written, MB resident)] of a run, to its end. Raises ValueError if it fails."""
    began, seen = time.monotonic(), []
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1.024e-3
            seen.append((time.monotonic() - began, finished(out), resident))
        except (OSError, TypeError):  # it has just ended
            pass
        time.sleep(0.5)
    seen.append((time.monotonic() - began, finished(out), seen[-1][2]))
    if process.returncode:
        raise ValueError(f"a run ended with exit code {process.returncode}")
    return seen


def images(out):
    return {path.name: files.digest([path]) for path in sorted(out.glob("*.npy"))}


def main():
    p = runtime.parser(__doc__)
    p.add_argument("--count", type=runtime.positive, default=10_000, help="files (default 10000)")
    p.add_argument("--kills", type=runtime.positive, default=5, help="runs that are killed (default 5)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make(folder / "few", 10, 256)
        make(folder / "in", args.count, SIDE)
        if start(folder, "few", "--out", "first", "--instant").wait():
            raise ValueError("no student")
        flags = ["in", "--model", "first/diffdenoise/student.pt", "--out"]
        seen = watch(start(folder, *flags, "out"), folder / "out")
        first = next(row for row in seen if row[1])
        half = next(row for row in seen if row[1] >= args.count / 2)
        for name, (seconds, count, resident) in (("first files", first), ("half", half), ("end", seen[-1])):
            print(f"{name}: {count} files after {seconds:.1f} s, {resident:.1f} MB resident", flush=True)
        each = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in ((first, half), (half, seen[-1]))]
        print(f"a file takes {1e3 * each[0]:.2f} ms in the first half, {1e3 * each[1]:.2f} ms in the second")
        log = (folder / "out/diffdenoise/files.jsonl").stat().st_size
        print(f"the log has {log / 1e6:.2f} MB; {len(record.read(folder / 'out/diffdenoise'))} jobs", flush=True)
        again = watch(start(folder, *flags, "out"), folder / "out")
        print(f"the same command again, with nothing to do: {again[-1][0]:.1f} s", flush=True)
        rng, goals = random.Random(0), []
        for _ in range(args.kills):
            goal = finished(folder / "killed") + rng.randrange(args.count // (args.kills + 1))
            process = start(folder, *flags, "killed")
            while process.poll() is None and finished(folder / "killed") < goal:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.wait()
            goals.append(finished(folder / "killed"))
        watch(start(folder, *flags, "killed"), folder / "killed")
        expected, found = images(folder / "out"), images(folder / "killed")
        differing = sum(expected.get(name) != digest for name, digest in found.items())
        left = len(list((folder / "killed").rglob("*.tmp")))
        print(f"killed after {', '.join(map(str, goals))} files, then to the end: {len(found)} files, of which")
        print(f"{differing} differ from those of the run that was left alone; {left} temporary files", flush=True)


if __name__ == "__main__":
    runtime.command(main)
