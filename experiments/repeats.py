"""A perfusion run, repeated: every repeat denoised, and measured against the mean of the others of its kind.

    In    REPEATS.h5              volumes (T,S,H,W): labels and controls in turn
    Out   FOLDER/run.nii.gz       the run as a 4D NIfTI, whose voxels are called 1 mm
          FOLDER/METHOD.nii.gz    denoised; FOLDER/instant, FOLDER/tuned: what denoise.py leaves
          FOLDER/table.md         the table of all methods that are there

    python -m experiments.repeats REPEATS.h5 --out FOLDER
    python -m experiments.repeats REPEATS.h5 --out FOLDER --methods none --also NAME=denoised.nii.gz   # only the table

Methods: nlm and bm3d, told the mean level in the brain; instant, tuned: `denoise.py run.nii.gz` with --instant, and
with --effort of its training. The level is the median over the brain of what each voxel's standard deviation is between
repeats of one kind that follow each other: half of the mean square difference. Pulse and breath change the image from
one to the next too; the median keeps the few voxels in which they do so most from deciding.

The reference of a repeat is the mean of the others of its kind, untouched. It has noise of its own, 1 / (n - 1) of the
variance, and the head drifts, pulses and moves against it. So even the repeat without noise would have an error: that
of the untouched repeats less the level. `limit` is its PSNR, and `error` what is left of a method's beyond it.

    PSNR, SSIM    of each repeat against its reference; range: the brightest voxel of the run. SSIM slice by slice
    error         root mean square in the brain, beyond the limit's, in levels
    variance      over time, of each kind, in the brain: share of the untouched run's
    difference    control - label, the mean over the run and the brain, in % of the mean; `change` of it by the method
    map           correlation in the brain of the maps of this difference, of the denoised and of the untouched run
    halves        the same of one half of the run, denoised, and the other half, untouched: what is gained is no noise
"""

from pathlib import Path

import h5py
import nibabel
import numpy as np

import data
import denoise
import evaluate
from experiments import baselines, classical
from lib import runtime

METHODS = ["nlm", "bm3d", "instant", "tuned"]
BRAIN = 0.3  # share of the bright voxels (95 %) from which on the mean image counts as brain


# ---------------------------------------------------------------------------------------------------------------
# measures
# ---------------------------------------------------------------------------------------------------------------
def brain_mask(run):
    """Where the mean image of a run (T,S,H,W) is bright, (S,H,W) bool."""
    mean = run.mean(0)
    return mean > BRAIN * np.percentile(mean, 95)


def others(run):
    """For each repeat of a run (T,S,H,W) the mean of the others of its kind: every second one."""
    out = np.empty_like(run)
    for kind in (slice(0, None, 2), slice(1, None, 2)):
        same = run[kind]
        out[kind] = (same.sum(0) - same) / (len(same) - 1)
    return out


def level(run, mask):
    """Standard deviation of the noise, median where the mask is: from repeats of one kind that follow each other."""
    found = np.median(np.square(run[2:, mask] - run[:-2, mask]).mean(0) / 2)
    count = (len(run) - 2) / 1.5  # of independent squares: each repeat is in two differences
    return float(np.sqrt(found / (1 - 2 / (9 * count)) ** 3))  # the median of chi^2 is below its mean


def temporal_variance(run, mask):
    """Mean variance over time, of each kind, where the mask is."""
    return float(np.mean([run[k::2, mask].var(0, ddof=1).mean() for k in (0, 1)]))


def difference(run):
    """The map (S,H,W) of the mean of the even repeats less that of the odd ones."""
    return run[::2].mean(0) - run[1::2].mean(0)


def measures(run, untouched, mask):
    """{measure: number} of a denoised run (T,S,H,W), see the module; the intensities of both about [0,1]."""
    reference, sigma = others(untouched), level(untouched, mask)
    limit = np.square((untouched - reference)[:, mask]).mean() - sigma**2  # of a repeat without noise
    mse, inside = np.square(run - reference).mean((1, 2, 3)), np.square((run - reference)[:, mask]).mean()
    ssim = [evaluate.psnr_ssim(*pair)[1] for x, r in zip(run, reference) for pair in zip(x, r)]
    before, after = (difference(r) for r in (untouched, run))
    half = len(run) // 4 * 2
    sides = [(run[:half], untouched[half:]), (run[half:], untouched[:half])]
    sign = np.sign(before[mask].mean())
    return dict(
        psnr=float(np.mean(-10 * np.log10(mse))),
        ssim=float(np.mean(ssim)),
        brain=float(-10 * np.log10(inside)),
        limit=float(-10 * np.log10(limit)),
        error=float(np.sqrt(max(inside - limit, 0)) / sigma),
        variance=temporal_variance(run, mask) / temporal_variance(untouched, mask),
        difference=float(100 * sign * after[mask].mean() / run[:, mask].mean()),
        change=float(100 * (after[mask].mean() / before[mask].mean() - 1)),
        map=float(np.corrcoef(before[mask], after[mask])[0, 1]),
        halves=float(np.mean([np.corrcoef(difference(a)[mask], difference(b)[mask])[0, 1] for a, b in sides])),
    )


# ---------------------------------------------------------------------------------------------------------------
# runs as files
# ---------------------------------------------------------------------------------------------------------------
def read_run(path):
    """The numbers (T,S,H,W) float32 of a 4D NIfTI."""
    return np.asarray(nibabel.load(path).dataobj, np.float32).T


def write_run(run, path):
    """Writes (T,S,H,W) as a 4D NIfTI uint16, rounded."""
    values = np.clip(np.rint(run), 0, 65535).astype(np.uint16).T
    temporary = path.with_name(f"part-{path.name}")  # nibabel goes by the ending
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), temporary)
    temporary.rename(path)


def classic(method, run, top, sigma, folder):
    """The run denoised by nlm or bm3d, (T,S,H,W), which is told the level sigma; files in `folder`."""
    dataset, out = folder / "run.h5", folder / f"{method}.h5"
    if not dataset.exists():
        with data.write_volumes(dataset, "dataset", "repeats") as add:
            for t, volume in enumerate(run / top):
                add(f"{t:03d}", volume.shape, ["noisy"], split="test")[0][:] = volume
    known = ["--sigma", f"{sigma / top:.6g}"] if method == "nlm" else ["--noise", f"gaussian:{sigma / top:.6g}"]
    module = baselines if method == "nlm" else classical
    module.main(["--data", str(dataset), "--method", method, *known, "--out", str(out)])
    pred = data.read_volumes(out, "pred")
    return top * np.stack([pred[name] for name in sorted(pred)])


def make(method, run, path, sigma, effort):
    """Denoises the run by a method and returns the path of the NIfTI; one that stands is not made again."""
    out = path.parent / method / path.name if method in ("instant", "tuned") else path.parent / f"{method}.nii.gz"
    if method in ("instant", "tuned"):  # which goes on where it was
        how = ["--instant"] if method == "instant" else ["--recipe", "tuned", "--effort", str(effort)]
        if denoise.main([str(path), "--out", str(out.parent), *how]):
            raise ValueError(f"denoise.py left {path} out")
    elif not out.exists():
        write_run(classic(method, run, float(run.max()), sigma, path.parent), out)
    return out


def table(rows):
    """The Markdown table of {method: measures}."""
    heads = "PSNR | SSIM | in the brain | error | variance | difference, % | change, % | map | halves"
    lines = [f"| | {heads} |", "|---" * (heads.count("|") + 2) + "|"]
    for name, m in rows.items():
        text = f"{m['psnr']:.2f} | {m['ssim']:.4f} | {m['brain']:.2f} | {m['error']:.2f} | {m['variance']:.3f} | "
        text += f"{m['difference']:.3f} | {m['change']:+.2f} | {m['map']:.3f} | {m['halves']:.3f}"
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("repeats", help="REPEATS.h5")
    p.add_argument("--out", required=True, help="folder for everything")
    p.add_argument("--methods", nargs="+", choices=[*METHODS, "none"], default=METHODS, help="default all")
    p.add_argument("--also", nargs="+", default=[], metavar="NAME=FILE", help="denoised 4D NIfTI files, for the table")
    p.add_argument("--effort", type=float, default=0.5, help="of the training of tuned (default 0.5)")
    p.add_argument("--first", type=runtime.positive, help="only so many repeats")
    args = p.parse_args(argv)
    with h5py.File(args.repeats) as file:
        if "volumes" not in file or getattr(file["volumes"], "ndim", 0) != 4 or len(file["volumes"]) < 8:
            raise ValueError(f"{args.repeats} has no `volumes` of 8 or more repeats, (T,S,H,W)")
        run = file["volumes"][: args.first].astype(np.float32)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    path, mask = folder / "run.nii.gz", brain_mask(run)
    if not path.exists():
        write_run(run, path)
    sigma, top = level(run, mask), float(run.max())
    files = {m: make(m, run, path, sigma, args.effort) for m in args.methods if m != "none"}
    files |= dict(text.split("=", 1) for text in args.also)
    rows = {"untouched": measures(run / top, run / top, mask)}
    for name, file in files.items():
        found = read_run(file)
        if found.shape != run.shape:
            raise ValueError(f"{file} is {found.shape}, the run {run.shape}")
        rows[name] = measures(found / top, run / top, mask)
    n, kept = len(run) // 2, 1 - sigma**2 / temporal_variance(run, mask)
    said = f"{len(run)} repeats, brain {100 * mask.mean():.0f} % of {mask.size} voxels, level {sigma:.2f} of {top:.0f} "
    said += f"({-20 * np.log10(sigma / top):.2f} dB).\nA mean of {n - 1} others has {100 / (n - 1):.1f} % of its "
    said += f"variance. A repeat without noise would have {rows['untouched']['limit']:.2f} dB in the brain,\nand keep "
    said += f"{kept:.3f} of the variance over time.\n"
    text = f"{table(rows)}\n\n{said}"
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    runtime.command(main)
