"""Noise as scanners make it: every method on simulated M4Raw and fastMRI scans, and how well their noise is measured.

    In    SCANS/TRUTH.h5, SIGMA.h5, noise.json    of scanner.py
    Out   FOLDER/NAME/cell.json                   {"methods": {method: scores}, "noise": agreement}, of the test split
          FOLDER/table.md                         tables of all cells in the folder

    python -m experiments.real m4raw=m4raw/ fastmri=fastmri/ --out FOLDER
    python -m experiments.real --out FOLDER                              # only the tables

Methods (--methods; all trainings have --steps):

    nlm bm3d                   told the true mean level, and BM3D the true correlation; no training
    nei2nei paper              Neighbor2Neighbor; the paper's recipe
    instant tuned              denoise.py --instant, denoise.py: the noise, and its map, measured
    instant_told tuned_told    the same, told the noise and its map; `corrected`: with --bias-correct, as measured
    supervised2                a student trained on the images without noise

NAME+ is the mean over the eight symmetries, which `tuned` has in any case. Scores (`scores`), PSNR in dB of the mean
square error of all test slices:

    psnr, ssim    against the image without noise, slice by slice as by evaluate.py
    expected      against the mean of the magnitude, which that of many repetitions converges to: denoisers that see
                  magnitudes alone cannot tell it from the image without noise
    head          against the image without noise, where that is above 3 standard deviations of the noise
    air, dark     bias: mean of x - clean in units of the mean standard deviation (`bias`)
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np

import data
import denoise
import evaluate
import noise
import posterior
from experiments import baselines, classical, volumes
from lib import runtime
from lib.stages import Stages

METHODS = ["nlm", "bm3d", "nei2nei", "paper", "instant", "tuned", "instant_told", "tuned_told", "supervised2"]
SCORES = {"psnr": ".2f", "ssim": ".3f", "expected": ".2f", "head": ".2f", "air": "+.2f", "dark": "+.2f"}


# ---------------------------------------------------------------------------------------------------------------
# measures
# ---------------------------------------------------------------------------------------------------------------
def masks(clean, sigma):
    """(head, air, dark tissue) of images without noise (S,H,W): above 3 sigma, below 0.5 sigma, from 1 to 3 sigma."""
    ratio = clean / sigma
    return ratio > 3, ratio < 0.5, (ratio >= 1) & (ratio < 3)


def agreement(measured, true, mask):
    """How well a measured map of standard deviations (S,H,W) agrees with the true one at the pixels of a mask.

    Returns {"within": share of pixels within 10 %, "low", "median", "high": 5, 50, 95 % of measured / true}.
    """
    ratio = np.asarray(measured, np.float64)[mask] / np.asarray(true, np.float64)[mask]
    low, median, high = np.percentile(ratio, [5, 50, 95])
    return dict(within=float(np.mean(np.abs(ratio - 1) <= 0.1)), low=float(low), median=float(median), high=float(high))


def bias(x, clean, mask_air, mask_dark, sigma=1.0):
    """(in air, in dark tissue): mean of x - clean at the pixels of two masks, in units of sigma; NaN for none."""
    gap = np.asarray(x, np.float64) - clean
    return tuple(float(gap[mask].mean() / sigma) if mask.any() else float("nan") for mask in (mask_air, mask_dark))


def decibels(gaps):
    """PSNR in dB, range 1, of differences [array]."""
    return float(-10 * np.log10(np.mean(np.square(np.concatenate([np.ravel(g) for g in gaps]), dtype=np.float64))))


def scores(dataset, law, pred, split="test"):
    """{measure: number} of the prediction file `pred`, or of the noisy images for None; law: SIGMA.h5 of scanner.py."""
    clean, expected, sigma = read_truth(dataset, law, split)
    out = data.read_matching(pred, dataset, split=split) if pred else data.read_volumes(dataset, "noisy", split)
    slices = evaluate.score(dataset, pred, split)
    found = dict(psnr=float(slices["psnr"].mean()), ssim=float(slices["ssim"].mean()), n=len(slices["psnr"]))
    found["expected"] = decibels([out[name] - expected[name] for name in clean])
    where = {name: masks(x, sigma[name]) for name, x in clean.items()}
    found["head"] = decibels([(out[name] - x)[where[name][0]] for name, x in clean.items()])

    def joined(arrays):
        return np.concatenate([np.ravel(a) for a in arrays])

    x, y, s = (joined(arrays[name] for name in clean) for arrays in (clean, out, sigma))
    head, air, dark = (joined(where[name][k] for name in clean).astype(bool) for k in range(3))
    found["air"], found["dark"] = bias(y, x, air, dark, float(s[head].mean()))
    return found


def read_truth(dataset, law, split):
    """({volume: clean}, {volume: expected magnitude}, {volume: sigma}) (S,H,W) of a split of TRUTH.h5 and SIGMA.h5."""
    maps = [data.read_matching(law, dataset, key, split=split) for key in ("pred", "sigma")]
    return data.read_volumes(dataset, "clean", split), *maps


def deviation_map(noise_model, x, gain=1.0):
    """Standard deviation (S,H,W) of the noise at clean intensities x (S,H,W), by a model of these divided by a gain."""
    return gain * np.sqrt(noise.variance(noise_model, x / gain))


def noise_agreement(measured, gains, true, dataset, law, split="test"):
    """How a measured noise model agrees with the truth: {`agreement` of the map in the head, "correlation", "through"}.

    measured, true: noise models. gains: {volume: (S,H,W)} of the measured one, or {}. The last two: largest difference
    of the correlation up to 2 pixels, and 1 and 2 slices apart; None if the latter was not measured.
    """
    clean, _, sigma = read_truth(dataset, law, split)
    told = {name: deviation_map(measured, x, gains[name][:] if gains else 1.0) for name, x in clean.items()}
    pieces = [(told[name], sigma[name], masks(x, sigma[name])[0]) for name, x in clean.items()]
    found = agreement(*(np.concatenate([np.ravel(piece[k]) for piece in pieces]) for k in range(3)))
    inner = np.s_[noise.REACH - 2 : noise.REACH + 3,] * 2
    tables = [np.asarray(model["correlation"])[inner] for model in (measured, true)]
    apart = [model["through"] for model in (measured, true)]
    known = None if None in apart[0] else float(np.abs(np.subtract(*apart)).max())
    return {**found, "correlation": float(np.abs(np.subtract(*tables)).max()), "through": known}


# ---------------------------------------------------------------------------------------------------------------
# cells
# ---------------------------------------------------------------------------------------------------------------
class Cell(Stages):
    """The stages of one image set; every training has --steps."""

    def training_flags(self, module):
        return ["--steps", self.args.steps, *super().training_flags(module)[2:]]


def run_cell(folder, scans, args):
    """Runs the methods on the scans of a folder of scanner.py, and writes folder/cell.json."""
    dataset, law, told = (str(scans / name) for name in ("TRUTH.h5", "SIGMA.h5", "noise.json"))
    stages = Cell(folder, dataset, args, data.fingerprints(dataset))
    found = folder / "cell.json"
    known = json.loads(found.read_text()) if found.exists() else {"methods": {}}
    known["methods"]["noisy"] = scores(dataset, law, None)
    for method in args.methods:
        for name, pred in predictions(stages, method, told).items():
            known["methods"][name] = scores(dataset, law, stages.path(pred))
        if method in ("instant", "tuned"):
            made, gains = stages.folder / method, {}
            if (made / "map.h5").exists():
                gains = data.read_matching(made / "map.h5", dataset, "gain", split="test")
            measured = noise.parse_noise_model(str(made / "noise.json"))
            known["noise"] = noise_agreement(measured, gains, noise.parse_noise_model(told), dataset, law)
            if measured["air"]:
                corrected = correct(measured, gains, dataset, stages.path(pred), made / "signal_out.h5")
                known["methods"][f"{method}, corrected"] = scores(dataset, law, corrected)
        evaluate.write_json(known, found)


def predictions(stages, method, told):
    """Runs a method; {name: its prediction file}. told: the file of the true noise model."""
    if method in ("nlm", *classical.METHODS):
        return volumes.classic(stages, method, told)
    if method == "nei2nei":
        flags = [*stages.data, "--method", method, "--steps", stages.args.steps, "--split", "test", *stages.common]
        flags += ["--crop", min(128, stages.smallest_side())]
        return {method: stages.run(baselines, *flags, out="nei2nei_out.h5", model="nei2nei.pt")}
    if method in ("instant", "tuned"):
        effort = stages.args.steps / denoise.TUNING_STEPS
        args = Namespace(**{**vars(stages.args), "effort": effort, "instant": method == "instant"})
        denoise.train(Stages(stages.folder / method, stages.data[1], args, stages.done["data"]), "tuned", 1)
        return {method: f"{method}/denoised.h5"}
    if method.endswith("told"):
        return told_method(stages, method, told)
    if method == "paper":
        return {method: denoise.paper_recipe(stages, denoise.blind_spot_estimate(stages))[0]}
    return volumes.trained(stages, method, told)


def correct(measured, gains, dataset, pred, out):
    """Writes what --bias-correct makes of the test split of a prediction; gains: as of noise_agreement. Returns out."""
    x = data.read_matching(pred, dataset, split="test")
    with data.write_volumes(out, "prediction", "posterior", {}, like=dataset) as new_volume:
        for name, volume in x.items():
            (kept,) = new_volume(name, volume.shape, ["pred"])
            for s in range(volume.shape[0]):
                gain = gains[name][s] if gains else 1.0
                mean = volume[s] / gain
                kept[s] = gain * posterior.signal(mean, evaluate.noise_at(mean, measured), measured["air"])
    return out


def told_method(stages, method, told):
    """The shipped network, or what it learns, told the true noise and its map. Returns {name: its predictions}."""
    gains, whole = stages.path("gain.h5"), stages.data
    if not Path(gains).exists():
        write_gains(Path(told).with_name("SIGMA.h5"), noise.parse_noise_model(told), whole[1], gains)
    stages.data = ["--data", stages.path(stages.run(noise, "divide", *whole, "--map", gains, out="told_even.h5"))]
    if method == "tuned_told":
        start, few = denoise.shipped(stages), ["--split", "train", "--ensemble", 1]
        denoise.learn(stages, start, told, 0, *few, name="first")
    out, like = {}, ["--like", whole[1]]
    for name, file in volumes.trained(stages, method, told).items():
        flags = [*stages.data, *like, "--pred", stages.path(file)]
        out[name] = stages.run(noise, "multiply", *flags, out=f"{name}_whole.h5")
    stages.data = whole
    return out


def write_gains(law, noise_model, dataset, out):
    """Writes `gain`: the true standard deviation of SIGMA.h5 in units of that of the noise model, a constant."""
    sigma, level = data.read_matching(law, dataset, "sigma"), noise_model["variance"][0] ** 0.5
    with data.write_volumes(out, "prediction", "scanner", {}, like=dataset) as new_volume:
        for name, volume in sigma.items():
            (kept,) = new_volume(name, volume.shape, ["gain"])
            for s in range(volume.shape[0]):
                kept[s] = volume[s] / level


# ---------------------------------------------------------------------------------------------------------------
# tables
# ---------------------------------------------------------------------------------------------------------------
def tables(folder):
    """The Markdown tables of all cells in a folder; the best PSNR without clean images in bold, of each kind."""
    lines = []
    for path in sorted(folder.glob("*/cell.json")):
        cell = json.loads(path.read_text())
        methods = {n: cell["methods"][n] for n in order() if n in cell["methods"]}
        best = {
            key: max(m[key] for name, m in methods.items() if not name.startswith("supervised"))
            for key in ("psnr", "ssim", "expected", "head")
        }
        lines += [f"## {path.parent.name}", "", f"| | {' | '.join(SCORES)} |", "|---" * (len(SCORES) + 1) + "|"]
        for name, m in methods.items():
            texts = {key: format(m[key], form) for key, form in SCORES.items()}
            row = [f"**{text}**" if m[key] == best.get(key) else text for key, text in texts.items()]
            lines.append(f"| {name} | {' | '.join(row)} |")
        lines += ["", f"{methods['noisy']['n']} test slices."]
        if "noise" in cell:
            m = cell["noise"]
            through = "not measured" if m["through"] is None else f"off by {m['through']:.3f}"
            said = f"{100 * m['within']:.0f} % of the head within 10 %, measured / true 5 % {m['low']:.2f}, "
            said += f"median {m['median']:.2f}, 95 % {m['high']:.2f}"
            lines += [
                "",
                f"Standard deviation of the noise: {said};",
                f"correlation in the plane off by {m['correlation']:.3f}, through slices {through}.",
            ]
        lines.append("")
    return "\n".join(lines)


def order():
    """All names of methods that a cell may hold, in the order of the tables."""
    return ["noisy", *(name + end for name in METHODS for end in ("", "+", ", corrected"))]


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("scans", nargs="*", metavar="NAME=SCANS", help="folders of scanner.py")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default all")
    p.add_argument("--steps", type=runtime.positive, default=1000, help="of every training (default 1000)")
    p.add_argument("--out", required=True, help="folder for everything")
    args = p.parse_args(argv)
    folder = Path(args.out)
    cells = {name: Path(scans) for name, _, scans in (text.partition("=") for text in args.scans)}
    for name, scans in cells.items():
        missing = [file for file in ("TRUTH.h5", "SIGMA.h5", "noise.json") if not (scans / file).is_file()]
        if not name or missing:
            raise ValueError(
                f"{name}={scans}: {', '.join(missing) or 'a name'} is missing: give NAME=FOLDER of scanner.py"
            )
    for name, scans in cells.items():
        run_cell(folder / name, scans, Namespace(**{**vars(args), "effort": 1.0}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(tables(folder))
    print(tables(folder))


if __name__ == "__main__":
    runtime.command(main)
