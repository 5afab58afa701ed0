"""What the diffusion stage gains while it trains: one sample and the SRDS pair against steps, and what comes back.

    Out   FOLDER/curves.json    {"condition": PSNR in dB, "points": [{step, seconds, loss, trivial, single, pair, ...}]}
          FOLDER/curves.md      the same as a table
          FOLDER/curves.png     the same as a figure, with --figure; several FOLDERs side by side

    python -m experiments.curves --data NOISY.h5 --noise gaussian:6/255 --at 250 500 1000 2000 4000 --out FOLDER
    python -m experiments.curves --figure curves.png --out FOLDER OTHER

The blind-spot network is trained first, then the diffusion model, with a look at it after each number of steps: its
loss beside that of an output of zero, the test slices' PSNR, and the PSNR that Stein's estimate expects of the pair
without clean images (with --noise, through the whole chain y -> x_c -> pair). What is left after `--` goes to
diffusion.py.

What comes back: pair - x_c is explained by two things, by least squares over all test pixels,

    pair - x_c = detail * (x - x_c) + own * n + rest

with x the clean image and n = y - x the noise of the pixel itself, of which x_c knows nothing (white noise). detail = 1
and own = 0 would be a perfect image but for the rest: noise of the neighbours, which x_c has seen, and errors.
`mix` is the best that any weighting of x_c and y reaches, D s2 / (D + s2) for errors of D and s2.
"""

import contextlib
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np

import bsn
import data
import diffusion
import evaluate
import noise
import srds
from lib import runtime, training
from lib.stages import Stages


def pooled(path, pred):
    """PSNR of the mean square error over the test split of a prediction file, dB."""
    return float(-10 * np.log10(np.mean(10 ** (-evaluate.score(path, pred, "test")["psnr"] / 10))))


def returns(path, cond, pair):
    """{"detail", "own", "rest", "mix"} on the test split: see the module. rest is an rms, mix a PSNR in dB."""
    clean, noisy = (data.read_volumes(path, key, "test") for key in ("clean", "noisy"))
    parts = data.read_matching(cond, path, split="test"), data.read_matching(pair, path, split="test")
    x, y, c, p = (np.concatenate([np.ravel(v[name][:]) for name in clean]) for v in (clean, noisy, *parts))
    sources, change = np.stack([x - c, y - x], 1).astype(np.float64), (p - c).astype(np.float64)
    found = np.linalg.lstsq(sources, change, rcond=None)[0]
    rest = float(np.sqrt(np.square(change - sources @ found).mean()))
    d, s2 = (np.square(v, dtype=np.float64).mean() for v in (x - c, y - x))
    return dict(detail=float(found[0]), own=float(found[1]), rest=rest, mix=float(-10 * np.log10(d * s2 / (d + s2))))


def look(stages, step, noise_model, sampling_steps):
    """One point of the curve, of the diffusion model as it stands in diffusion.pt.part."""
    line = json.loads((stages.folder / "diffusion.jsonl").read_text().splitlines()[-1])
    point = {"step": step, "seconds": line["seconds"], "loss": line.get("smoothed"), "trivial": line.get("trivial")}
    model = stages.path("diffusion_now.pt")
    shutil.copyfile(training.partial_path(stages.folder / "diffusion.pt"), model)
    for mode in ("single", "pair"):
        flags = ["--cond", stages.path("bsn_out.h5"), "--model", model, "--split", "test", "--mode", mode]
        srds.main([*flags, "--steps", str(sampling_steps), "--out", stages.path(f"{mode}_out.h5")])
        point[mode] = pooled(stages.data[1], stages.path(f"{mode}_out.h5"))
    point |= returns(stages.data[1], stages.path("bsn_out.h5"), stages.path("pair_out.h5"))
    if noise_model:
        chain = srds.chain(bsn.estimator(stages.path("bsn.pt")), srds.sampler(model, steps=sampling_steps))
        noisy = data.read_volumes(stages.data[1], "noisy", "test")
        point["estimated"] = evaluate.estimate(chain, noisy, noise_model, 8)["psnr"]
    return point


def run(args, flags):
    """Trains, looks, and writes curves.json and curves.md after each point."""
    folder, noise_model = Path(args.out[0]), noise.parse_noise_model(args.noise) if args.noise else None
    stages = Stages(folder, args.data, Namespace(**vars(args), effort=1.0))
    blind = ["--blind-spot", noise_model["blind_spot"]] if noise_model else []
    flags_of_bsn = [*stages.data, *blind, *stages.training_flags(bsn), *args.bsn.split()]  # the last ones count
    stages.run(bsn, *flags_of_bsn, out="bsn_out.h5", model="bsn.pt")
    curve = dict(condition=pooled(args.data, stages.path("bsn_out.h5")), flags=flags, points=[])
    common = [*stages.data, "--cond", stages.path("bsn_out.h5"), "--model", stages.path("diffusion.pt"), "--resume"]
    common += [*map(str, stages.common), "--steps", str(args.at[-1]), "--context", "0"]
    training.partial_path(folder / "diffusion.pt").unlink(missing_ok=True)
    for step in args.at:
        with contextlib.suppress(SystemExit):
            diffusion.main([*common, *flags, "--stop-at", str(step)])
        curve["points"].append(look(stages, step, noise_model, args.sampling_steps))
        evaluate.write_json(curve, folder / "curves.json")
        (folder / "curves.md").write_text(table(curve))
        print(table(curve), flush=True)


def table(curve):
    """The Markdown table of a curve."""
    names = ["step", "seconds", "loss", "trivial", "single", "pair", "estimated", "mix", "detail", "own", "rest"]
    lines = [f"Condition: {curve['condition']:.2f} dB; diffusion.py {' '.join(curve['flags']) or 'as it comes'}", ""]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    digits = dict(step=0, seconds=0, loss=3, trivial=3, rest=4)
    for p in curve["points"]:
        shown = ["" if p.get(name) is None else f"{p[name]:.{digits.get(name, 2)}f}" for name in names]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def figure(folders, out):
    """What the pair gains over its condition against steps, and what comes back, for each of the folders."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(3.2 * len(folders), 4.8), dpi=80, layout="constrained")
    axes = fig.subplots(2, len(folders), squeeze=False, sharey="row")
    for (top, bottom), folder in zip(axes.T, folders):
        curve = json.loads((Path(folder) / "curves.json").read_text())
        points, known = curve["points"], curve["condition"]
        steps = [p["step"] for p in points]
        top.axhline(0, color="gray")
        for name, style in dict(pair="k-", estimated="k:").items():
            if name in points[0]:
                label = "SRDS pair" if name == "pair" else "the same, estimated without clean images"
                top.plot(steps, [p[name] - known for p in points], style, marker=".", label=label)
        for name, label in dict(detail="detail that the condition lost", own="the pixel's own noise").items():
            bottom.plot(steps, [p[name] for p in points], marker=".", label=f"came back: {label}")
        top.set(xscale="log", title=f"{Path(folder).name}\ncondition {known:.2f} dB")
        bottom.set(xscale="log", xlabel="steps of the diffusion model", ylim=(-0.05, 0.6))
        for ax in (top, bottom):
            ax.set_xticks(steps, list(map(str, steps)))
            ax.set_xticks([], minor=True)
    axes[0, 0].set_ylabel("PSNR above the condition, dB")
    axes[1, 0].set_ylabel("share (regression)")
    handles = [line for ax in axes[:, 0] for line in ax.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    with runtime.atomic_write(out) as temporary:
        fig.savefig(temporary, format="png")


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("--data", help="dataset with clean and noisy images (.h5)")
    p.add_argument("--noise", help="kind:level[:correlation] of its noise, for the estimated PSNR and the blind spot")
    p.add_argument("--at", nargs="+", type=runtime.positive, default=[250, 500, 1000, 2000], help="steps to look after")
    p.add_argument("--bsn", default="", metavar="FLAGS", help='flags for bsn.py in quotes, such as "--steps 4000"')
    p.add_argument("--sampling-steps", type=runtime.positive, default=10, help="DDIM steps (default 10)")
    p.add_argument("--figure", help="only draw the figure of the folders (.png)")
    p.add_argument("--out", nargs="+", required=True, help="folder for everything; several for --figure")
    args, flags = p.parse_known_args(argv)
    if args.figure:
        return figure(args.out, args.figure)
    if not args.data:
        raise ValueError("--data is needed, but for --figure")
    run(args, [flag for flag in flags if flag != "--"])


if __name__ == "__main__":
    runtime.command(main)
