"""Quality on volumes: the shipped network, students with neighbouring slices and without, and their rivals.

    Out   FOLDER/NAME-NOISE/cell.json    {method: {psnr, psnr_sd, ssim, ssim_sd, leak, n, p}}, of the test split
          FOLDER/table.md                a table of all cells in the folder

    python -m experiments.volumes head=HEAD.h5 t2w=T2W.h5 --noise gaussian:6/255 gaussian:6/255:1.2 --out FOLDER
    python -m experiments.volumes --out FOLDER                                      # only the table

HEAD.h5 holds clean images (data.py import). Methods (--methods):

    nlm bm3d bm4d dipy ants   told the true noise (ants finds it by itself); no training
    instant, tuned          denoise.py: a network of weights/, and what it has learned from the noisy images
    instant_told, tuned_told   the same, told the true noise as those above
    scratch0 1 2 3          a new student by recorruption, with so many slices on each side
    supervised0 2           such a student trained on the clean images

Self-supervised students know the noise as measured with the help of the shipped network. Each is written NAME (one
evaluation) and NAME+ (mean over the eight symmetries); `instant` and `tuned` are means over three planes as well, as
denoise.py has it (lib/planes.py). All trainings have --steps.
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np

import data
import denoise
import distill
import evaluate
import noise
from experiments import baselines, classical
from lib import runtime
from lib.stages import Stages

METHODS = ["nlm", "bm3d", "bm4d", "dipy", "ants", "instant", "tuned", "instant_told", "tuned_told"]
METHODS += ["scratch0", "scratch1", "scratch2", "scratch3", "supervised0", "supervised2"]


def run_cell(folder, clean, spec, args):
    """Makes the noisy images of a cell, runs the methods on them, and writes cell.json."""
    stages = Stages(folder, folder / "noisy.h5", args)
    kind, level, *blur = spec.split(":")
    flags = ["--kind", kind, "--level", level, "--correlation", *(blur or ["0"]), "--seed", args.seed]
    stages.run(noise, "add", "--data", clean, *flags, out="noisy.h5")
    preds = {}
    for method in args.methods:
        preds |= (classic if method in ("nlm", *classical.METHODS) else trained)(stages, method, spec)
    named = [f"{name}={stages.path(file)}" for name, file in preds.items()]
    found = folder / "cell.json"
    known = json.loads(found.read_text()) if found.exists() else {}
    evaluate.main([*stages.data, "--pred", *named, "--json", str(found)])
    seconds = {name: stages.done[file].get("processor_seconds") for name, file in preds.items()}
    made = json.loads(found.read_text())
    made = {name: {**m, "processor_seconds": seconds.get(name)} for name, m in made.items()}
    for name in args.methods:
        if (folder / f"{name}.pt").exists():
            made[name] |= estimates(stages, name, spec)
    evaluate.write_json({**known, **made}, found)


def estimates(stages, name, spec):
    """PSNR of the mean square error of a student: the true one, and as estimated with the noise measured and told.

    Of one evaluation in one plane.
    """
    clean, noisy = (data.read_volumes(stages.data[1], key, "test") for key in ("clean", "noisy"))
    student = distill.student(stages.path(f"{name}.pt"))
    errors = [np.square(student.alone(y) - clean[v]).ravel() for v, y in noisy.items()]
    found = {"pooled": -10 * np.log10(np.concatenate(errors).mean(dtype=np.float64))}
    for how, law in (("measured", stages.path("noise.json")), ("told", spec)):
        found[how] = evaluate.estimate(student.once, noisy, noise.parse_noise_model(law), 1000)["psnr"]
    return found


def classic(stages, method, spec):
    """A denoiser without training, told the noise."""
    if method == "nlm":
        level = noise.facts(noise.parse_noise_model(spec), data.read_volumes(stages.data[1], "clean", "test"))[3]
        flags = [*stages.data, "--sigma", f"{level:.6g}", "--split", "test"]
        return {method: stages.run(baselines, *flags, out="nlm_out.h5")}
    flags = [*stages.data, "--method", method, "--noise", spec, "--split", "test"]
    return {method: stages.run(classical, *flags, out=f"{method}_out.h5")}


def both(stages, name, model):
    """{name: one evaluation, name+: the mean over the symmetries} of a student, on the test split."""
    flags = [*stages.data, "--predict", "--split", "test", "--model", stages.path(model), *stages.common]
    pairs = ((name, 1), (f"{name}+", 8))
    return {n: stages.run(distill, *flags, "--ensemble", count, out=f"{n}_out.h5") for n, count in pairs}


def measured(stages):
    """The noise, measured with the help of the shipped network as denoise.py does: the path of its file."""
    if not (stages.folder / "noise.json").exists():
        denoise.measure_noise(stages, "noise_first.json")
        start, known = denoise.shipped(stages), stages.path("noise_first.json")
        first = denoise.learn(stages, start, known, 0, "--split", "train", "--ensemble", 1, name="first")
        denoise.measure_noise(stages, "noise.json", "--pred", stages.path(first))
    return stages.path("noise.json")


def trained(stages, method, spec):
    """A student, trained as its name says."""
    kind, _, told = method.rstrip("0123").partition("_")
    steps, flags = stages.args.steps, ["--target", "clean"]
    if kind != "supervised":
        flags = ["--target", "recorrupted", "--noise", spec if told else measured(stages)]
    if kind in ("scratch", "supervised"):
        flags += ["--context", method[-1]]
    else:
        flags += ["--init", denoise.shipped(stages), "--lr", denoise.TUNING_RATE, "--planes"]
        flags += ["--pred", stages.path("first_out.h5")] if kind == "tuned" else []
        steps = 0 if kind == "instant" else steps
    flags += [*stages.data, "--split", "test", "--ensemble", 1, "--steps", steps, *stages.common]
    stages.run(distill, *flags, out=f"{method}1_out.h5", model=f"{method}.pt")
    return both(stages, method, f"{method}.pt")


def table(folder):
    """The Markdown table of all cells in a folder: PSNR in dB, the best without clean images in bold."""
    cells = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/cell.json"))}
    names = ["noisy", *(name + end for name in METHODS for end in ("", "+"))]
    methods = [name for name in names if any(name in cell for cell in cells.values())]
    lines = ["| PSNR, dB | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    for m in methods:
        row = []
        for cell in cells.values():
            best = max((c["psnr"] for n, c in cell.items() if not n.startswith("supervised")), default=0)
            text = f"{cell[m]['psnr']:.2f}" if m in cell else ""
            row.append(f"**{text}**" if text and cell[m]["psnr"] == best else text)
        lines.append(f"| {m} | {' | '.join(row)} |")
    lines += [
        "",
        "| PSNR of the mean square error, dB | true | estimated, noise told | noise measured |",
        "|---|---|---|---|",
    ]
    for name, cell in cells.items():
        for method, m in cell.items():
            if "pooled" in m:
                lines.append(f"| {name}, {method} | {m['pooled']:.2f} | {m['told']:.2f} | {m['measured']:.2f} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("images", nargs="*", metavar="NAME=CLEAN.h5", help="datasets of clean images")
    p.add_argument("--noise", nargs="+", default=["gaussian:6/255"], help="kind:level[:correlation] (gaussian:6/255)")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default all")
    p.add_argument("--steps", type=runtime.positive, default=1000, help="of every training (default 1000)")
    p.add_argument("--out", required=True, help="folder for everything")
    args = p.parse_args(argv)
    folder = Path(args.out)
    for text in args.images:
        name, _, clean = text.partition("=")
        for spec in args.noise:
            cell = folder / f"{name}-{spec.replace('/', '_').replace(':', '-')}"
            run_cell(cell, clean, spec, Namespace(**{**vars(args), "effort": 1.0}))
    (folder / "table.md").write_text(table(folder))
    print(table(folder))


if __name__ == "__main__":
    runtime.command(main)
