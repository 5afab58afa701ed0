"""Noisy images that were stored as JPEG: which recipe of denoise.py is best there, and what the estimated error says.

    Out   FOLDER/NAME-QUALITY/cell.json    {method: {psnr, ssim, seconds, estimated}}, of the test split
          FOLDER/table.md                  a table of all cells in the folder

    python -m experiments.compressed head=HEAD.h5 chest=CHEST.h5 --quality 75 90 --out FOLDER
    python -m experiments.compressed --pairs M4RAW_PAIRS.h5 --out FOLDER     # stored so by who published them
    python -m experiments.compressed --out FOLDER                            # only the table

HEAD.h5 holds clean images (data.py import): noise is added once, and every slice of every split goes through JPEG of 8
bits. Methods: instant, tuned and paper are recipes of denoise.py as they come (--effort of their training);
Neighbor2Neighbor trains for as many steps as `tuned`.
"""

import io
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image

import data
import denoise
import evaluate
from experiments import baselines, budget, reproduce_data
from lib import runtime
from lib.stages import Stages

METHODS = ("instant", "tuned", "paper", "nei2nei")


def through_jpeg(image, quality):
    """A slice (H,W) in [0,1] as it comes back from a JPEG file of that quality, float32."""
    file = io.BytesIO()
    Image.fromarray(np.clip(np.rint(255 * image), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def write_compressed(path, quality, out):
    """Writes a dataset like `path` whose noisy slices went through JPEG."""
    clean, noisy, attrs = data.read_volumes(path, "clean"), data.read_volumes(path), data.read_attrs(path)[1]
    with data.write_volumes(out, "dataset", "compressed") as add:
        for name, volume in noisy.items():
            stored = np.stack([through_jpeg(image, quality) for image in volume])
            kept = {**attrs[name], "fingerprint": data.fingerprint(stored)}
            for array, values in zip(add(name, stored.shape, ["noisy", "clean"], **kept), (stored, clean[name])):
                array[:] = values


def run_cell(folder, dataset, args):
    """Runs the methods on a dataset, and writes folder/cell.json."""
    seconds, estimated = {}, {}
    for method in args.methods:
        own = Namespace(**vars(args), instant=method == "instant")
        stages = Stages(folder / method, dataset, own, data.fingerprints(dataset))
        if method == "nei2nei":
            steps = max(1, round(args.effort * denoise.TUNING_STEPS))
            flags = [*stages.data, "--method", method, "--steps", steps, *stages.common]
            stages.run(baselines, *flags, out="denoised.h5", model="nei2nei.pt")
        else:
            denoise.train(stages, "paper" if method == "paper" else "tuned", 1)
            best = stages.folder / ("stopping.json" if method == "paper" else "best.json")
            found = json.loads(best.read_text()) if best.exists() else {}
            estimated[method] = {name: one["psnr"] for name, one in found.items()}
        seconds[method] = sum(done["processor_seconds"] for _, done in stages.outputs())
    preds = [f"{method}={folder / method / 'denoised.h5'}" for method in args.methods]
    cell = folder / "cell.json"
    evaluate.main(["--data", str(dataset), "--pred", *preds, "--json", str(cell)])
    scores = json.loads(cell.read_text())
    for method in args.methods:
        scores[method] |= dict(seconds=round(seconds[method]), estimated=estimated.get(method, {}))
    evaluate.write_json(scores, cell)


def table(folder):
    """The Markdown table of all cells in a folder: PSNR in dB / SSIM, processor seconds."""
    lines = [f"| PSNR / SSIM (seconds) | noisy | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 2) + "|"]
    for path in sorted(folder.glob("*/cell.json")):
        cell, row = json.loads(path.read_text()), []
        for name in ("noisy", *METHODS):
            m = cell.get(name)
            spent = f" ({m['seconds']} s)" if m and "seconds" in m else ""
            row.append(f"{m['psnr']:.2f} / {m['ssim']:.3f}{spent}" if m else "")
        lines.append(f"| {path.parent.name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("images", nargs="*", metavar="NAME=CLEAN.h5", help="datasets of clean images")
    p.add_argument("--noise", default="gaussian:6/255", help="kind:level[:correlation] (default gaussian:6/255)")
    p.add_argument("--quality", nargs="+", type=runtime.positive, default=[75, 90], help="of JPEG (default 75 90)")
    p.add_argument("--pairs", metavar="FILE", help="M4Raw pairs, as reproduce_data.py has them")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default all")
    p.add_argument("--effort", type=float, default=1.0, help="multiplies the training steps (default 1)")
    p.add_argument("--out", required=True, help="folder for everything")
    args = p.parse_args(argv)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    cells = {}
    for text in args.images:
        name, _, clean = text.partition("=")
        noisy = budget.noisy_cell(folder / f"{name}_noisy", clean, args.noise, args, args.seed).data[1]
        for quality in args.quality:
            cells[f"{name}-{quality}"] = folder / f"{name}-{quality}.h5"
            write_compressed(noisy, quality, cells[f"{name}-{quality}"])
    if args.pairs:
        cells["m4raw"] = folder / "m4raw.h5"
        reproduce_data.pairs(args.pairs, cells["m4raw"], 240)
    for name, dataset in cells.items():
        run_cell(folder / name, dataset, args)
    (folder / "table.md").write_text(table(folder))
    print(table(folder))


if __name__ == "__main__":
    runtime.command(main)
