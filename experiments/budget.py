"""Quality after so many seconds of training: shipped network, tuned, new students, Neighbor2Neighbor, supervised.

    Out   FOLDER/rates.json              seconds of a training step of each method, measured on this machine at first
          FOLDER/NAME-NOISE-SEED/cell.json   {method: {psnr, psnr_sd, ssim, ..., seconds}}, of the test split
          FOLDER/table.md, seconds.png   means over the seeds; PSNR against seconds of one core

    export OMP_NUM_THREADS=1
    python -m experiments.budget head=HEAD.h5 chest=CHEST.h5 --noise gaussian:6/255 poisson:200 --seeds 0 1 --out FOLDER
    peers/bin/python -m experiments.peers --data FOLDER/CELL/noisy.h5 --out FOLDER/CELL      # in each cell, if wanted
    python -m experiments.budget --out FOLDER                            # scores what the cells hold, table and figure

The datasets hold clean images (data.py import); noise is added to them. A method is NAME@SECONDS:

    shipped              a network of weights/, untrained       tuned     what it becomes on the noisy images
    scratch, supervised  a new student, by recorruption or with the clean images, with the neighbours that suit
    supervised2d         the same without neighbours            nei2nei   Neighbor2Neighbor, with that network
    nlm bm3d bm4d        told the true noise
    careamics-..., deepinv-...   other packages: see peers.py

`seconds` are the processor's, of everything from the noisy file to the predictions of the test split: with
OMP_NUM_THREADS=1, seconds of one core. @SECONDS are those of training alone.
`shipped`, `tuned` and `scratch` measure the noise. All students but `nei2nei` are means over the eight symmetries, the
first two over three planes too, as what `denoise.py` writes is; a second row of `tuned`, `tuned1`, is one evaluation in
each plane.
"""

import json
import time
from argparse import Namespace
from pathlib import Path

import numpy as np

import data
import denoise
import distill
import evaluate
import noise
from experiments import baselines, volumes
from lib import runtime
from lib.stages import Stages

TRAINED = ["tuned", "scratch", "nei2nei", "supervised2d", "supervised"]
CLASSIC = ["nlm", "bm3d", "bm4d"]
MEASURE = ("shipped", "tuned", "scratch")  # the noise, before they begin


def train(stages, method, spec, steps, name):
    """Trains a method for so many steps; returns the file of its predictions for the test split."""
    flags = [*stages.data, "--split", "test", "--steps", steps, *stages.common]
    made = dict(out=f"{name}_out.h5", model=f"{name}.pt")
    if method == "nei2nei":
        return stages.run(baselines, *flags, "--method", "nei2nei", **made)
    if method in ("tuned", "scratch"):
        flags += ["--target", "recorrupted", "--noise", volumes.measured(stages)]
    else:
        flags += ["--target", "clean", *(["--context", 0] if method == "supervised2d" else [])]
    if method == "tuned":
        flags += ["--init", denoise.shipped(stages), "--lr", denoise.TUNING_RATE, "--pred", stages.path("first_out.h5")]
        flags += ["--planes"]
    return stages.run(distill, *flags, **made)


def rates(folder, clean, spec, args):
    """{method: processor seconds of a training step} of FOLDER/rates.json; measured at first if it is not there."""
    path = folder / "rates.json"
    if not path.exists():
        found, stages = {}, noisy_cell(folder / "rates", clean, spec, args, 0)
        volumes.measured(stages)
        for method in args.methods:
            spent = []
            for steps in (1, 20, 120):  # the first warms up
                began = time.process_time()
                train(stages, method, spec, steps, f"{method}{steps}")
                spent.append(time.process_time() - began)
            found[method] = (spent[2] - spent[1]) / 100
        evaluate.write_json(found, path)
    return json.loads(path.read_text())


def noisy_cell(folder, clean, spec, args, seed):
    """Stages on images to which noise was added."""
    stages = Stages(folder, folder / "noisy.h5", Namespace(**{**vars(args), "effort": 1.0, "seed": seed}))
    kind, level, *blur = spec.split(":")
    flags = ["--kind", kind, "--level", level, "--correlation", *(blur or ["0"]), "--seed", seed]
    stages.run(noise, "add", "--data", clean, *flags, out="noisy.h5")
    return stages


def run_cell(folder, clean, spec, args, seed, step):
    """Runs all methods on one dataset with one noise and one seed: their predictions for the test split."""
    stages = noisy_cell(folder, clean, spec, args, seed)

    def attempt(run, *arguments, **made):
        return run(*arguments, **made)

    deep = min(v.shape[0] for v in data.read_volumes(str(stages.data[1]), "noisy", "test").values()) > 1
    for method in args.classic:
        if deep or method != "bm4d":
            attempt(volumes.classic, stages, method, spec)
    told = ["--target", "recorrupted", "--noise", volumes.measured(stages), "--init", denoise.shipped(stages)]
    test = [*stages.data, "--split", "test", *stages.common]
    attempt(stages.run, distill, *test, *told, "--planes", "--steps", 0, out="shipped_out.h5", model="shipped.pt")
    for method in args.methods:
        for seconds in args.seconds:
            if method == "supervised2d" and not deep:
                continue
            attempt(train, stages, method, spec, round(seconds / step[method]), f"{method}@{seconds}")
            if method == "tuned":
                one = ["--predict", "--ensemble", 1, "--model", stages.path(f"tuned@{seconds}.pt")]
                attempt(stages.run, distill, *test, *one, out=f"tuned1@{seconds}_out.h5")


def judge(folder):
    """Scores the predictions that stand in the folder of a cell: cell.json."""
    preds = {path.name.removesuffix("_out.h5"): path for path in sorted(folder.glob("*_out.h5"))}
    preds.pop("first", None)  # the first look, with which the noise is measured
    named = [f"{name}={path}" for name, path in preds.items()]
    evaluate.main(["--data", str(folder / "noisy.h5"), "--pred", *named, "--json", str(folder / "cell.json")])
    found = json.loads((folder / "cell.json").read_text())
    done = json.loads((folder / "stages.json").read_text())
    peers = [json.loads(path.read_text()) for path in folder.glob("*-*.json")]
    measuring = sum(done[name]["processor_seconds"] for name in ("noise_first.json", "first_out.h5", "noise.json"))
    for name in preds:
        method = name.partition("@")[0]
        if (record := done.get(f"{name}_out.h5")) is None:
            found[name]["seconds"] = next(peer[name]["seconds"] for peer in peers if name in peer)
        elif method != "tuned1":  # that is `tuned` once more
            found[name]["seconds"] = record["processor_seconds"] + (measuring if method in MEASURE else 0)
    evaluate.write_json(found, folder / "cell.json")


def table(folder):
    """The Markdown table: PSNR in dB, means over seeds; in bold the best without clean images."""
    cells = {}
    for path in sorted(folder.glob("*/cell.json")):
        cells.setdefault(path.parent.name.rpartition("-")[0], []).append(json.loads(path.read_text()))
    methods = list(dict.fromkeys(name for seeds in cells.values() for cell in seeds for name in cell))
    mean = {name: {m: np.mean([c[m]["psnr"] for c in s]) for m in s[0]} for name, s in cells.items()}
    apart = {name: {m: np.ptp([c[m]["psnr"] for c in s]) for m in s[0]} for name, s in cells.items()}
    lines = ["| PSNR, dB | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    for m in methods:
        row = []
        for found in mean.values():
            best = max(v for n, v in found.items() if not n.startswith("supervised"))
            text = f"{found[m]:.2f}" if m in found else ""
            row.append(f"**{text}**" if text and found[m] == best else text)
        lines.append(f"| {m} | {' | '.join(row)} |")
    widest = max((v for found in apart.values() for v in found.values()), default=0)
    count = sorted({len(s) for s in cells.values()})
    between = f"; the same method differs by at most {widest:.2f} dB between them" if count[-1:] > [1] else ""
    lines += ["", f"Seeds a cell: {', '.join(map(str, count))}{between}."]
    return "\n".join(lines) + "\n"


def figure(folder):
    """PSNR against processor seconds, a panel a cell (its first seed): one line a method, a point a budget."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    cells = {}
    for path in sorted(folder.glob("*-0/cell.json")):
        lines = cells.setdefault(path.parent.name[:-2], {})
        for name, score in json.loads(path.read_text()).items():
            method = name.partition("@")[0]
            if "seconds" in score:
                method = "ours" if method in ("shipped", "tuned") else method
                lines.setdefault(method, []).append((score["seconds"], score["psnr"]))
    colors = dict(zip(sorted({m for lines in cells.values() for m in lines} - {"ours"}), colormaps["tab20"].colors))
    colors["ours"] = "black"
    wide = min(2, len(cells))
    fig = Figure(figsize=(4.8 * wide, 3.6 * -(-len(cells) // wide) + 0.8), dpi=90, layout="constrained")
    shown = {}
    for ax, (name, lines) in zip(np.ravel(fig.subplots(-(-len(cells) // wide), wide)), cells.items()):
        for method, points in lines.items():
            look = dict(color=colors[method], marker="o", markersize=4, lw=2.5 if method == "ours" else 1.5)
            if method in CLASSIC:  # the bar: not to be overlooked among lines
                look |= dict(color=f"C{CLASSIC.index(method)}", marker="D", markersize=7, zorder=3)
            shown[method] = ax.plot(*zip(*sorted(points)), label=method, **look)[0]
        top = max(psnr for points in lines.values() for _, psnr in points)
        title = name.replace("-", ", ", 1).replace("-", " ").replace("_", "/")
        ax.set(xscale="log", title=title, xlabel="seconds of one core, all included", ylabel="PSNR, dB")
        ax.set_ylim(top - 7, top + 0.3)
        below = sorted((psnr, m, s) for m, points in lines.items() for s, psnr in points if psnr < top - 7)
        if below:
            said = [f"{m} {s:.0f} s: {psnr:.1f}" for psnr, m, s in below]
            ax.text(0.03, 0.03, "\n".join(["below:", *said]), transform=ax.transAxes, fontsize=6.5)
    fig.legend(handles=list(shown.values()), loc="outside lower center", ncols=5, fontsize=8)
    with runtime.atomic_write(folder / "seconds.png") as temporary:
        fig.savefig(temporary, format="png")


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("images", nargs="*", metavar="NAME=CLEAN.h5", help="datasets of clean images")
    p.add_argument("--noise", nargs="+", default=["gaussian:6/255"], help="kind:level[:correlation] (gaussian:6/255)")
    p.add_argument("--seconds", nargs="+", type=int, default=[40, 400], help="of training (default 40 and 400)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the noise and of the training (default 0)")
    p.add_argument("--methods", nargs="+", choices=TRAINED, default=TRAINED, help="default all")
    p.add_argument("--classic", nargs="*", choices=CLASSIC, default=CLASSIC, help="default all")
    p.add_argument("--out", required=True, help="folder for everything")
    args = p.parse_args(argv)
    folder = Path(args.out)
    for seed in args.seeds:
        for text in args.images:
            name, _, clean = text.partition("=")
            for spec in args.noise:
                step = rates(folder, clean, spec, args)
                cell = folder / f"{name}-{spec.replace('/', '_').replace(':', '-')}-{seed}"
                run_cell(cell, clean, spec, args, seed, step)
    for path in folder.glob("*-*/noisy.h5"):
        judge(path.parent)
    (folder / "table.md").write_text(table(folder))
    figure(folder)
    print(table(folder))


if __name__ == "__main__":
    runtime.command(main)
