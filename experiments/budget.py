"""Quality after so many minutes of training: the pipeline without clean images, and NAFNet trained on clean ones.

    python results/budget.py ours|supervised|student NOISY.h5 FOLDER [MINUTES...]          # default 1 2 4 8

ours: `denoise.py --recipe recorrupted` with the --effort that takes so long, blind-spot network and student together.
supervised: `distill.py --target clean --preset nafnet`. student: the same with the network of `fast`. How long a step
takes is measured first. Prints the training time that was taken and the PSNR and SSIM on the test split.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script, *flags):
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def trained(*logs):
    """Seconds of training."""
    return sum(json.loads(Path(log).read_text().splitlines()[-1])["seconds"] for log in logs)


def attempt(way, noisy, folder, effort):
    """(seconds of training, psnr, ssim) of `effort` times the steps of the preset."""
    out = folder / f"{way}-{effort:.3f}"
    if way == "ours":
        run("denoise", "--data", noisy, "--out", out, "--recipe", "recorrupted", "--effort", effort)
        seconds, pred = trained(out / "bsn.jsonl", out / "recorrupted.jsonl"), out / "denoised.h5"
    else:
        out.mkdir(exist_ok=True)
        preset, steps = ("nafnet", 1500) if way == "supervised" else ("fast", 5000)
        flags = ["--target", "clean", "--preset", preset, "--steps", max(1, round(effort * steps)), "--split", "test"]
        pred = out / "out.h5"
        run("distill", "--data", noisy, *flags, "--model", out / "model.pt", "--out", pred)
        seconds = trained(out / "model.jsonl")
    run("evaluate", "--data", noisy, "--pred", f"x={pred}", "--json", out / "results.json")
    found = json.loads((out / "results.json").read_text())["x"]
    return seconds, found["psnr"], found["ssim"]


way, noisy, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
whole = attempt(way, noisy, folder, 0.05)[0] / 0.05
print(f"| {way} | minutes | seconds of training | PSNR | SSIM |\n|---|---|---|---|---|", flush=True)
for minutes in map(float, sys.argv[4:] or (1, 2, 4, 8)):
    seconds, psnr, ssim = attempt(way, noisy, folder, 60 * minutes / whole)
    print(f"| {way} | {minutes:g} | {seconds:.0f} | {psnr:.2f} | {ssim:.4f} |", flush=True)
