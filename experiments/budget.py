"""Quality after so many seconds of training: shipped network, tuned, new students, Neighbor2Neighbor, supervised.

    Out   FOLDER/rates.json              seconds of a training step of each method, measured on this machine at first
          FOLDER/NAME-NOISE-SEED/cell.json   {method: {psnr, psnr_sd, ssim, ...}}, of the test split
          FOLDER/table.md                means over the seeds

    python -m experiments.budget head=HEAD.h5 chest=CHEST.h5 --noise gaussian:6/255 poisson:200 --seeds 0 1 --out FOLDER
    python -m experiments.budget --out FOLDER                                              # only the table

The datasets hold clean images (data.py import); noise is added to them. A method is NAME@SECONDS:

    shipped              a network of weights/, untrained       tuned     what it becomes on the noisy images
    scratch, supervised  a new student, by recorruption or with the clean images, with the neighbours that suit
    supervised2d         the same without neighbours            nei2nei   Neighbor2Neighbor, with that network
    nlm bm3d bm4d        told the true noise

`shipped`, `tuned` and `scratch` measure the noise. All students but `nei2nei` are means over the eight symmetries, as
what `denoise.py` writes is; a second row of `tuned`, `tuned1`, is one evaluation.
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
SELF_SUPERVISED = ("shipped", "tuned", "scratch", "nei2nei")


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
    return stages.run(distill, *flags, **made)


def rates(folder, clean, spec, args):
    """{method: seconds of a training step} of FOLDER/rates.json; measured by 20 and 120 steps if it is not there."""
    path = folder / "rates.json"
    if not path.exists():
        found, stages = {}, noisy_cell(folder / "rates", clean, spec, args, 0)
        volumes.measured(stages)
        for method in TRAINED:
            took = []
            for steps in (20, 120):
                began = time.monotonic()
                train(stages, method, spec, steps, f"{method}{steps}")
                took.append(time.monotonic() - began)
            found[method] = (took[1] - took[0]) / 100
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
    """Runs all methods on one dataset with one noise and one seed; writes cell.json."""
    stages = noisy_cell(folder, clean, spec, args, seed)
    preds = {}

    def attempt(name, run, *arguments):
        stages.changed = False  # the methods do not depend on each other
        preds[name] = run(*arguments)

    deep = min(v.shape[0] for v in data.read_volumes(str(stages.data[1]), "noisy", "test").values()) > 1
    for method in args.classic:
        if deep or method != "bm4d":
            attempt(method, lambda: volumes.classic(stages, method, spec)[method])  # noqa: B023  called at once
    known = volumes.measured(stages)
    told = ["--target", "recorrupted", "--noise", known, "--init", denoise.shipped(stages), "--steps", 0]
    flags = [*stages.data, *told, "--split", "test", *stages.common]
    attempt("shipped", lambda: stages.run(distill, *flags, out="shipped_out.h5", model="shipped.pt"))
    for method in args.methods:
        for seconds in args.seconds if method == "tuned" else args.seconds[-1:]:
            name = f"{method}@{seconds}"
            if method == "supervised2d" and not deep:
                continue
            attempt(name, train, stages, method, spec, round(seconds / step[method]), name)
    one = [*stages.data, "--predict", "--split", "test", "--ensemble", 1, *stages.common]
    for name in [n for n in preds if n.startswith("tuned")]:
        flags = [*one, "--model", stages.path(f"{name}.pt")]
        attempt(name.replace("tuned", "tuned1"), lambda: stages.run(distill, *flags, out=f"{name}-1_out.h5"))  # noqa: B023
    named = [f"{name}={stages.path(file)}" for name, file in preds.items()]
    evaluate.main([*map(str, stages.data), "--pred", *named, "--json", str(folder / "cell.json")])


def table(folder):
    """The Markdown table: PSNR in dB, means over seeds; in bold the best of what is trained without clean images."""
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
            best = max(v for n, v in found.items() if n.partition("@")[0] in SELF_SUPERVISED)
            text = f"{found[m]:.2f}" if m in found else ""
            row.append(f"**{text}**" if text and found[m] == best else text)
        lines.append(f"| {m} | {' | '.join(row)} |")
    widest = max((v for found in apart.values() for v in found.values()), default=0)
    count = sorted({len(s) for s in cells.values()})
    between = f"; the same method differs by at most {widest:.2f} dB between them" if count[-1:] > [1] else ""
    lines += ["", f"Seeds a cell: {', '.join(map(str, count))}{between}."]
    return "\n".join(lines) + "\n"


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("images", nargs="*", metavar="NAME=CLEAN.h5", help="datasets of clean images")
    p.add_argument("--noise", nargs="+", default=["gaussian:6/255"], help="kind:level[:correlation] (gaussian:6/255)")
    p.add_argument("--seconds", nargs="+", type=int, default=[30, 60, 120], help="of training; others take the last")
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
    (folder / "table.md").write_text(table(folder))
    print(table(folder))


if __name__ == "__main__":
    runtime.command(main)
