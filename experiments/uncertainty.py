"""What a student says of what it does not know: is `std` right, are its samples possible, does it warn of lesions?

    Out   FILE.md    tables; FILE.json: all numbers; FILE.png: a slice, its mean, samples and std, with --figure

    python -m experiments.uncertainty --out results/uncertainty.md FOLDER/head-gaussian-6_255 ...

FOLDERs are cells of experiments.volumes with a student (--student, default tuned.pt), which is told the true noise.

coverage    how many clean pixels lie within one and two std, by intensity; 68 and 95 % would be right
spectrum    power of a sample, and of the student, over that of the clean image, in ten bands of frequency. Bands where
            the noise is stronger than the image are left out of `worst`
covariance  of y - sample, over that of the noise: variance, and the largest difference of the correlation up to 3
            pixels away. A mean has less variance
lesions     200 round spots, 1 to 3 pixels wide (full width at half maximum), three times the noise's deviation high,
            inserted in the clean image at random places of tissue, and as many places left alone. What is found
            there is the amplitude of the spot that fits best: lost below half, invented above half. Warned: the lost
            spot lies within 2 std of the student's output
"""

import json
from pathlib import Path

import numpy as np
import torch

import data
import distill
import evaluate
import noise
from experiments.stein import noise_of
from lib import panels, runtime

LESIONS, CONTRAST, BANDS = 200, 3, 10
REACH = 4  # pixels from the centre of a lesion to the edge of its window


def whole(function, context):
    """(S,H,W) to (n,S,H,W): a student's function, slice by slice."""

    def of_volume(y):
        slices = (torch.from_numpy(data.read_around(y, s, context).astype(np.float32))[None] for s in range(len(y)))
        return np.concatenate([function(v).numpy() for v in slices]).swapaxes(0, 1)

    return of_volume


def bands(v):
    """Mean power (10,) of slices (S,H,W) in bands of spatial frequency up to 0.5 cycles per pixel."""
    window = np.outer(*(np.hanning(n) for n in v.shape[1:]))
    power = (np.abs(np.fft.fft2(v * window)) ** 2).mean(0)
    f = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, v.shape[1:]), indexing="ij"))
    which = np.digitize(f, np.linspace(0, 0.5, BANDS + 1)) - 1
    return np.array([power[which == k].mean() for k in range(BANDS)])


def covariances(residual):
    """{(dy, dx): covariance} of (S,H,W) with itself, up to three pixels away."""
    h, w = residual.shape[1:]
    lags = [(dy, dx) for dy in range(4) for dx in range(4)]
    return {
        (dy, dx): float((residual[:, : h - dy, : w - dx] * residual[:, dy:, dx:]).mean(dtype=np.float64))
        for dy, dx in lags
    }


def spots(x, level, rng):
    """Lesions [(slice, row, column, spot (9,9))] at random places of tissue, no two of which overlap."""
    s2, taken, out = level * CONTRAST, np.zeros(x.shape, bool), []
    tissue = x > 0.15
    offset = np.arange(-REACH, REACH + 1)
    for s, r, c in rng.permutation(np.argwhere(tissue)):
        area = np.s_[s, r - REACH : r + REACH + 1, c - REACH : c + REACH + 1]
        if taken[area].shape != (2 * REACH + 1,) * 2 or taken[area].any() or tissue[area].mean() < 0.8:
            continue
        taken[s, max(r - 2 * REACH, 0) : r + 2 * REACH + 1, max(c - 2 * REACH, 0) : c + 2 * REACH + 1] = True
        width = rng.uniform(1, 3) / 2.355
        out.append((s, r, c, s2 * np.exp(-np.add.outer(offset**2, offset**2) / (2 * width**2))))
        if len(out) == 2 * LESIONS:
            break
    return out


def amplitude(image, s, r, c, spot):
    """How much of the spot is in the image: least squares, its mean around the place taken off."""
    area = image[s, r - REACH : r + REACH + 1, c - REACH : c + REACH + 1]
    centred = spot - spot.mean()
    return float((area * centred).sum() / (centred**2).sum())


def lesions(mean_and_std, draw, x, y, level):
    """{"lost", "invented", ...}: shares of the inserted and of the absent lesions, for the student and for a sample."""
    places = spots(x, level, np.random.default_rng(0))
    half = len(places) // 2
    with_spots, noisy = x.copy(), y.copy()
    for s, r, c, spot in places[:half]:
        for image in (with_spots, noisy):
            image[s, r - REACH : r + REACH + 1, c - REACH : c + REACH + 1] += spot.astype(np.float32)
    (mean, std), (sample,) = mean_and_std(noisy), draw(noisy, 1)
    found = dict(lesions=half)
    for name, image in (("student", mean), ("sample", sample)):
        shares = np.array([amplitude(image - x, *place) for place in places])
        found[name] = dict(lost=float((shares[:half] < 0.5).mean()), invented=float((shares[half:] > 0.5).mean()))
    lost = [p for p in places[:half] if amplitude(mean - x, *p) < 0.5]
    warned = [abs(with_spots[p[:3]] - mean[p[:3]]) < 2 * std[p[:3]] for p in lost]
    return found | dict(warned=float(np.mean(warned)) if warned else None)


def study(folder, student):
    """All numbers of one cell."""
    law, path = noise_of(folder), folder / "noisy.h5"
    noisy, clean = (data.read_volumes(path, key, "test") for key in ("noisy", "clean"))
    y, x = (np.concatenate([v[name] for name in clean]) for v in (noisy, clean))
    denoise = distill.student(folder / student, told=(law, noisy), std=True)
    mean_and_std, once = whole(denoise, denoise.context), whole(denoise.once, denoise.context)

    def draw(y, count):
        return denoise.draw(y, once(y)[0], np.random.default_rng(0), count)

    mean, std = mean_and_std(y)
    made = folder / "uncertainty.h5"
    with data.write_volumes(made, "prediction", "distill", {}, like=path) as add:
        first = 0
        for name, v in clean.items():
            for array, values in zip(add(name, v.shape, ["pred", "std"]), (mean, std)):
                array[:] = values[first : first + len(v)]
            first += len(v)
    sample = draw(y, 1)[0]
    level = noise.variance(law, x).mean() ** 0.5
    true, own, image = covariances(y - x), covariances(y - sample), bands(x)
    seen = bands(y - x) < image
    off = max(abs(own[lag] - true[lag]) / true[0, 0] for lag in own if lag != (0, 0))
    ratios = {name: bands(v) / image for name, v in (("sample", sample), ("student", mean))}
    return dict(
        coverage=evaluate.calibration(path, made, "test"),
        spectrum={name: ratio.round(3).tolist() for name, ratio in ratios.items()},
        worst={name: float(np.abs(ratio[seen] - 1).max()) for name, ratio in ratios.items()},
        variance=dict(sample=own[0, 0] / true[0, 0], student=covariances(y - mean)[0, 0] / true[0, 0]),
        correlation_off=off,
        lesions=lesions(mean_and_std, draw, x, y, level),
    ), (x, y, mean, sample, 2 * mean - sample, std)


def table(found):
    """Markdown of {cell: numbers}."""
    percent = "{:.0f} / {:.0f}".format
    lines = ["| within 1 / 2 std, % | darkest quarter | second | third | brightest |", "|---|---|---|---|---|"]
    for name, m in found.items():
        shown = [percent(100 * one, 100 * two) for _, _, one, two in m["coverage"]]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    head = ["cell", "worst band: sample", "student", "variance of y - sample", "of y - student", "correlation off by"]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, m in found.items():
        numbers = [*(f"{100 * m['worst'][k]:.0f} %" for k in ("sample", "student"))]
        numbers += [*(f"{m['variance'][k]:.2f}" for k in ("sample", "student")), f"{m['correlation_off']:.3f}"]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    head = ["cell", "lesions", "lost by the student", "by a sample", "invented by the student", "by a sample", "warned"]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, m in found.items():
        m = m["lesions"]
        shares = [f"{100 * m[who][what]:.0f} %" for what in ("lost", "invented") for who in ("student", "sample")]
        warned = "" if m["warned"] is None else f"{100 * m['warned']:.0f} %"
        lines.append(f"| {name} | {m['lesions']} | {' | '.join(shares)} | {warned} |")
    return "\n".join(lines) + "\n"


def figure(images, path):
    """A window of the middle slice: clean, noisy, student, two samples of one pair, std. Writes a PNG."""
    from matplotlib.figure import Figure

    middle = len(images[0]) // 2
    side = min(110, *images[0].shape[1:])
    top, left = panels.most_detail(images[0][middle], side)
    fig = Figure(figsize=(13, 2.4), dpi=90, layout="constrained")
    titles, bright = ("clean", "noisy", "student", "sample +", "sample -", "std"), 0.0
    for ax, title, image in zip(fig.subplots(1, 6), titles, images):
        window = image[middle, top : top + side, left : left + side]
        bright = bright or float(window.max())
        ax.imshow(window, cmap="magma" if title == "std" else "gray", vmin=0, vmax=None if title == "std" else bright)
        ax.set(xticks=[], yticks=[], title=title)
    with runtime.atomic_write(path) as temporary:
        fig.savefig(temporary, format="png")


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="cells of experiments.volumes")
    p.add_argument("--student", default="tuned.pt", help="its file in the folders (default tuned.pt)")
    p.add_argument("--figure", help="figure of the first cell to write (.png)")
    p.add_argument("--out", required=True, help="tables to write (.md)")
    args = p.parse_args(argv)
    found = {}
    for folder in map(Path, args.folders):
        found[folder.name], images = study(folder, args.student)
        if args.figure and len(found) == 1:
            figure(images, args.figure)
    with runtime.atomic_write(args.out) as temporary:
        temporary.write_text(table(found))
    with runtime.atomic_write(Path(args.out).with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(found, indent=1, default=float) + "\n")
    print(table(found))


if __name__ == "__main__":
    runtime.command(main)
