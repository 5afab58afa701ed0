"""Quality after so many minutes of training: the recipe without clean images, and NAFNet trained on clean ones.

    python -m experiments.budget ours NOISY.h5 FOLDER                  # after 1, 2, 4 and 8 minutes
    python -m experiments.budget supervised NOISY.h5 FOLDER 3 6        # after 3 and 6 minutes

    ours         `denoise.py --recipe scratch`, blind-spot network and student together
    supervised   `distill.py --target clean --preset nafnet`
    student      the same with the network of preset `fast`

How long a step takes is measured first, on a twentieth of the usual training. Prints a Markdown table: the seconds of
training that were really taken, PSNR and SSIM on the test split.
"""

import json
import subprocess
import sys
from pathlib import Path

import distill
from lib import runtime

ROOT = Path(__file__).parent.parent


def run(script, *flags):
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def attempt(way, noisy, folder, effort):
    """(seconds of training, psnr, ssim) of `effort` times the steps of the preset."""
    out = folder / f"{way}-{effort:.3f}"
    if way == "ours":
        run("denoise", "--data", noisy, "--out", out, "--recipe", "scratch", "--effort", effort)
        pred, logs = out / "denoised.h5", [out / "bsn.jsonl", out / "recorrupted.jsonl"]
    else:
        out.mkdir(exist_ok=True)
        pred, logs = out / "out.h5", [out / "model.jsonl"]
        preset = "nafnet" if way == "supervised" else "fast"
        steps = max(1, round(effort * distill.PRESETS[preset]["steps"]))
        flags = ["--target", "clean", "--preset", preset, "--steps", steps, "--split", "test"]
        run("distill", "--data", noisy, *flags, "--model", out / "model.pt", "--out", pred)
    run("evaluate", "--data", noisy, "--pred", f"x={pred}", "--json", out / "results.json")
    found = json.loads((out / "results.json").read_text())["x"]
    seconds = sum(json.loads(log.read_text().splitlines()[-1])["seconds"] for log in logs)
    return seconds, found["psnr"], found["ssim"]


def main():
    p = runtime.parser(__doc__)
    p.add_argument("way", choices=("ours", "supervised", "student"))
    p.add_argument("noisy", metavar="NOISY.h5", help="dataset with clean images, which only the table needs")
    p.add_argument("folder", type=Path, help="for everything that is made")
    p.add_argument("minutes", type=float, nargs="*", default=[1, 2, 4, 8], help="default 1 2 4 8")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    usual = attempt(args.way, args.noisy, args.folder, 0.05)[0] / 0.05  # seconds of training at effort 1
    print(f"| {args.way} | minutes | seconds of training | PSNR | SSIM |\n|---|---|---|---|---|", flush=True)
    for minutes in args.minutes:
        seconds, psnr, ssim = attempt(args.way, args.noisy, args.folder, 60 * minutes / usual)
        print(f"| {args.way} | {minutes:g} | {seconds:.0f} | {psnr:.2f} | {ssim:.4f} |", flush=True)


if __name__ == "__main__":
    main()
