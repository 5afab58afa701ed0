"""Repetitions of one scan: denoise their mean, or take the mean of them denoised? On simulated M4Raw scans.

    In    SCANS/TRUTH.h5, SIGMA.h5, multicoil_*/*01.h5, *02.h5, ...    of scanner.py, the repetitions of each scan
    Out   FOLDER/table.md      PSNR in the head, dB, against the image without noise, and the mean of its magnitude

    python -m experiments.averages SCANS --counts 1 2 3 6 --out FOLDER

    mean               of so many repetitions, as it is
    mean, denoised     that mean, through denoise.py --instant
    denoised, mean     the mean of these repetitions, each through denoise.py --instant

Of independent Gaussian noise of one level the mean is all that repetitions know of the image (a sufficient statistic):
a network that is given them as channels can do no better than one that is given their mean.
"""

from argparse import Namespace
from pathlib import Path

import h5py
import numpy as np

import data
import denoise
from experiments import real
from lib import runtime
from lib.stages import Stages

COLUMNS = ("mean", "mean, denoised", "denoised, mean")


def write_mean(scans, which, out):
    """Writes a dataset like TRUTH.h5 whose `noisy` is the mean of some repetitions, by number from 1; returns `out`."""
    with data.write_volumes(out, "dataset", "averages") as add:
        for name, attrs in data.read_attrs(scans / "TRUTH.h5")[1].items():
            mean = 0
            for r in which:
                with h5py.File(scans / f"multicoil_{attrs['split']}" / f"{name[:-2]}{r:02d}.h5") as file:
                    mean = mean + (file["reconstruction_rss"][:] - attrs["offset"]) / attrs["scale"] / len(which)
            kept = {**attrs, "fingerprint": data.fingerprint(mean)}
            add(name, mean.shape, ["noisy"], **kept)[0][:] = mean
    return out


def denoised(noisy, args):
    """The test split of a dataset through denoise.py --instant, {name: (S,H,W)}; all else stays beside it."""
    args = Namespace(**vars(args), effort=1.0, instant=True)
    denoise.train(Stages(noisy.parent, noisy, args, data.fingerprints(noisy)), "tuned", 1)
    return data.read_matching(noisy.parent / "denoised.h5", noisy, split="test")


def decibels(scans, images):
    """(against the image without noise, against its expected magnitude) of {name: (S,H,W)}: PSNR in the head, dB."""
    clean, expected, sigma = real.read_truth(scans / "TRUTH.h5", scans / "SIGMA.h5", "test")
    head = {name: real.masks(x, sigma[name])[0] for name, x in clean.items()}
    return [real.decibels([(images[name] - x)[head[name]] for name, x in true.items()]) for true in (clean, expected)]


def run(scans, args):
    """{count: {column: (PSNR, PSNR)}}."""
    folder, ones, found = Path(args.out), [], {}
    for r in range(1, max(args.counts) + 1):
        own = folder / f"repetition_{r}"
        own.mkdir(parents=True, exist_ok=True)
        made = denoised(write_mean(scans, [r], own / "noisy.h5"), args)
        ones.append({name: volume[:] for name, volume in made.items()})
    for count in args.counts:
        own = folder / f"mean_{count}"
        own.mkdir(exist_ok=True)
        noisy = write_mean(scans, range(1, count + 1), own / "noisy.h5")
        before = data.read_volumes(noisy, "noisy", "test")
        after = {name: np.mean([one[name] for one in ones[:count]], 0) for name in before}
        images = dict(zip(COLUMNS, (before, denoised(noisy, args), after)))
        found[count] = {column: decibels(scans, some) for column, some in images.items()}
    return found


def table(found):
    """The Markdown table: against the image without noise / against the expected magnitude."""
    lines = [f"| repetitions | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for count, row in found.items():
        lines.append(f"| {count} | {' | '.join('{:.2f} / {:.2f}'.format(*row[column]) for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("scans", metavar="SCANS", help="folder of scanner.py")
    p.add_argument("--counts", nargs="+", type=runtime.positive, default=[1, 2, 3, 6], help="default 1 2 3 6")
    p.add_argument("--out", required=True, help="folder for everything")
    args = p.parse_args(argv)
    found = table(run(Path(args.scans), args))
    (Path(args.out) / "table.md").write_text(found)
    print(found)


if __name__ == "__main__":
    runtime.command(main)
