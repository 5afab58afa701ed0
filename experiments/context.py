"""What neighbouring slices cost and bring: seconds, stripes in other planes, correlated noise, what `auto` chooses.

    python -m experiments.context cost                                    # step and slice time with 0, 2, 4 neighbours
    python -m experiments.context stripes --data NOISY.h5 --pred A.h5 B.h5 --figure planes.png
    python -m experiments.context through --data CLEAN.h5 --out FOLDER    # noise correlated through the slices by 0.5
    python -m experiments.context auto FILE ...                           # what --context auto chooses for image files

stripes: the error of a slice-wise denoiser jumps from slice to slice, which other planes show as stripes. Printed is
the energy of the differences of output - clean between neighbouring slices, in units of that error's own energy (2 for
errors that are independent from slice to slice) and of the range squared.
through: two students of the same steps and data: one with the joint recorruption, told the correlation, one not.
"""

import json
import statistics
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import data
import denoise
import distill
import evaluate
import noise
from lib import crops, files, formats, runtime
from lib.stages import Stages

THROUGH = 0.5


def cost(args):
    """A row for each number of neighbours: milliseconds of a training step and of a slice of 256x256 pixels."""
    preset = distill.PRESETS["fast"]
    shape = {key: preset[key] for key in distill.SHAPE}
    networks = {}
    for context in (0, 2, 4):
        network = distill.build_network(**shape, context=context).to(memory_format=torch.channels_last)
        crops = torch.rand(preset["batch"], 2 * context + 1, preset["crop"], preset["crop"])
        networks[context] = network, crops, torch.rand(1, 2 * context + 1, 256, 256)
    step, one = {k: [] for k in networks}, {k: [] for k in networks}
    device = torch.device("cpu")
    for _ in range(args.repeats):  # in turn, so that what else the machine does falls on all
        for k, (network, crops, image) in networks.items():
            began = time.perf_counter()
            with runtime.autocast(device):
                distill.recorruption_loss(network, crops, 0.02 * torch.randn_like(crops[:, :1])).backward()
            step[k].append(time.perf_counter() - began)
            began = time.perf_counter()
            with runtime.autocast(device), torch.inference_mode():
                network(image)
            one[k].append(time.perf_counter() - began)
    print("| slices on each side | step, ms | against none | slice, ms | against none |\n|---|---|---|---|---|")
    for k in networks:
        a, b, a0, b0 = (1000 * statistics.median(v) for v in (step[k], one[k], step[0], one[0]))
        print(f"| {k} | {a:.1f} | {100 * (a / a0 - 1):+.0f} % | {b:.1f} | {100 * (b / b0 - 1):+.0f} % |")


def stripes(args):
    """A row for each prediction file, and a figure: a slice of each plane and the errors there."""
    clean, rows, errors = data.read_volumes(args.data, "clean", "test"), [], {}
    for name, path in evaluate.parse_predictions(args.pred).items():
        pred, energy, jumps = data.read_matching(path, args.data, split="test"), [], []
        for volume in clean:
            error = np.asarray(pred[volume][:], np.float64) - clean[volume][:]
            energy.append(np.square(error).mean())
            jumps.append(np.square(np.diff(error, axis=0)).mean())
        errors[name] = error
        rows.append((name, np.mean(jumps), np.mean(jumps) / np.mean(energy)))
    print("| method | energy of slice-to-slice differences | in units of the error's |\n|---|---|---|")
    for name, jump, ratio in rows:
        print(f"| {name} | {jump:.3g} | {ratio:.2f} |")
    if args.figure:
        planes(np.asarray(clean[volume][:]), errors, args.figure)


def planes(x, errors, path):
    """Figure: coronal and sagittal planes of the clean volume x (S,H,W) and of errors {name: (S,H,W)}. Writes a PNG."""
    from matplotlib.figure import Figure

    titles, volumes = ["clean", *errors], [x, *errors.values()]
    scale = 3 * float(np.std(next(iter(errors.values()))))
    figure = Figure(figsize=(2.6 * len(volumes), 2.6), dpi=90, layout="constrained")
    for k, (title, v) in enumerate(zip(titles, volumes)):
        for row, plane in enumerate((v[:, v.shape[1] // 2], v[:, :, v.shape[2] // 2])):
            ax = figure.add_subplot(2, len(volumes), row * len(volumes) + k + 1)
            look = dict(cmap="RdBu_r", vmin=-scale, vmax=scale) if k else dict(cmap="gray")
            ax.imshow(plane, aspect=3, interpolation="nearest", **look)
            ax.set(xticks=[], yticks=[], ylabel=("coronal", "sagittal")[row] if k == 0 else "")
            ax.set_title(title if row == 0 else "", fontsize=8)
    with runtime.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def through(args):
    """Adds noise that is correlated through the slices, trains a student that knows and one that does not, compares."""
    folder = Path(args.out)
    stages = Stages(folder, folder / "noisy.h5", Namespace(**vars(args), effort=1.0))
    model = noise.known("gaussian", 6 / 255) | dict(through=[THROUGH, 0.0])
    told = {"joint": model, "ignored": noise.known("gaussian", 6 / 255)}
    with data.open_file(args.data) as file:  # an import of clean images calls them noisy, as it cannot know
        key = "clean" if "clean" in next(iter(file["volumes"].values())) else "noisy"
    clean = data.read_volumes(args.data, key)
    with data.write_volumes(folder / "noisy.h5", "dataset", "noise", {}, like=args.data) as add:
        for k, (name, x) in enumerate(clean.items()):
            kept, noisy = add(name, x.shape, ["clean", "noisy"])
            kept[:] = x[:]
            noisy[:] = x[:] + noise.sample(model, np.asarray(x[:]), runtime.step_rng(args.seed, k))
            noisy.parent.attrs["fingerprint"] = data.fingerprint(noisy)
    measured = denoise.measure_noise(stages, "measured.json")["through"]
    print(f"correlation one and two slices away: {THROUGH} and 0, measured {measured}")
    named = []
    for name, known in told.items():
        (folder / f"{name}.json").write_text(json.dumps(known))
        flags = ["--target", "recorrupted", "--noise", stages.path(f"{name}.json"), "--context", 2, "--split", "test"]
        flags += ["--steps", args.steps, *stages.common]
        stages.run(distill, *stages.data, *flags, out=f"{name}_out.h5", model=f"{name}.pt")
        named.append(f"{name}={stages.path(f'{name}_out.h5')}")
    evaluate.main([*stages.data, "--pred", *named, "--json", stages.path("results.json")])


def auto(args):
    """A row for each volume of the files: its shape, how alike its neighbouring slices are, what `auto` chooses."""
    print("| file | volume | slices | likeness | slices on each side |\n|---|---|---|---|---|")
    items, problems = formats.find(args.files)
    for item in items:
        for volume in formats.read(item):
            values = files.normalize(volume)[0]
            alike = f"{crops.likeness(values):.2f}" if len(values) > 2 else ""
            chosen = data.choose_context("auto", {volume.name: values})
            print(f"| {item.files[0].name} | {volume.name} | {'x'.join(map(str, values.shape))} | {alike} | {chosen} |")
    print("\n".join(problems))


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("what", choices=("cost", "stripes", "through", "auto"))
    p.add_argument("files", nargs="*", help="image files, for auto")
    p.add_argument("--data", help="dataset (.h5)")
    p.add_argument("--pred", nargs="*", default=[], metavar="[NAME=]FILE", help="prediction files, for stripes")
    p.add_argument("--figure", help="figure to write, for stripes (.png)")
    p.add_argument("--steps", type=runtime.positive, default=1000, help="of each training of through (default 1000)")
    p.add_argument("--repeats", type=runtime.positive, default=30, help="of each timing (default 30)")
    p.add_argument("--out", default="through", help="folder of through (default through)")
    args = p.parse_args(argv)
    {"cost": cost, "stripes": stripes, "through": through, "auto": auto}[args.what](args)


if __name__ == "__main__":
    runtime.command(main)
