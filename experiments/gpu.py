"""Ten minutes on a GPU: do the tests pass there, how fast is the paper's size, what does the diffusion stage gain?

    Out   FILE          {"machine", "tests", "bench", "curves"}, written after each part
          FILE's name without its ending, a folder: what the parts left behind

    python -m experiments.gpu --out results/gpu.json
    python -m experiments.gpu --out try.json --device cpu --parts curves --at 2 4 -- --width 8 --mult 1 2 --crop 32

tests    `pytest`, which computes on the GPU wherever a test does not name a device
bench    training steps and slices of all networks at the sizes of preset `paper` (experiments.bench)
curves   experiments.curves on the built-in brain (or --data: clean and noisy images, Gaussian noise 6/255), with a
         diffusion network of paper-like size; what is left after `--` goes to diffusion.py instead
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import data
import noise
from experiments import bench, curves
from lib import runtime

PARTS = ("tests", "bench", "curves")
DIFFUSION = "--width 96 --mult 1 2 4 --patch 1 --groups 8 --batch 16 --crop 128 --lr 2e-4".split()
NOISE = "gaussian:6/255"


def tests(args, folder, flags):
    """The last line of pytest, and its seconds."""
    began, root = time.monotonic(), Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *args.tests], cwd=root, capture_output=True, text=True)
    (folder / "tests.txt").write_text(done.stdout + done.stderr)
    last = (done.stdout.strip() or "no output").splitlines()[-1]
    return dict(passed=done.returncode == 0, said=last, seconds=round(time.monotonic() - began))


def benchmark(args, folder, flags):
    """Step and slice times at the sizes of preset `paper`."""
    out = folder / "bench.json"
    shared = ["--preset", "paper", "--repeats", "3", "--device", args.device]
    bench.main([*shared, "--sections", "train", "infer", "sample", "--out", str(out)])
    return json.loads(out.read_text())


def diffusion_curves(args, folder, flags):
    """The diffusion stage while it trains."""
    clean, noisy = folder / "clean.h5", args.data or folder / "noisy.h5"
    if not args.data:
        data.main(["import", "--source", "brain", "--out", str(clean)])
        level = NOISE.partition(":")[2]
        noise.main(["add", "--data", str(clean), "--level", level, "--seed", str(args.seed), "--out", str(noisy)])
    shared = ["--device", args.device, "--precision", args.precision, "--seed", str(args.seed)]
    at = ["--at", *map(str, args.at), "--bsn", args.bsn]
    curves.main(
        ["--data", str(noisy), "--noise", NOISE, *shared, *at, "--out", str(folder), "--", *(flags or DIFFUSION)]
    )
    return json.loads((folder / "curves.json").read_text())


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default all")
    p.add_argument("--data", help="dataset for the curves (.h5), instead of the built-in brain")
    p.add_argument("--tests", nargs="+", default=["tests"], help="what pytest runs (default tests)")
    p.add_argument("--at", nargs="+", type=runtime.positive, default=[250, 500, 1000, 2000, 4000], help="as of curves")
    p.add_argument("--bsn", default="--steps 4000", help='flags for bsn.py in quotes (default "--steps 4000")')
    p.add_argument("--out", default="gpu.json", help="results to write (default gpu.json)")
    args, flags = p.parse_known_args(argv)
    device = runtime.pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    found = dict(machine=dict(device=name, torch=torch.__version__))
    folder = Path(args.out).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    run = dict(tests=tests, bench=benchmark, curves=diffusion_curves)
    for part in args.parts:
        found[part] = run[part](args, folder, [flag for flag in flags if flag != "--"])
        with runtime.atomic_write(args.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["machine"] | {part: "done" for part in args.parts}))


if __name__ == "__main__":
    runtime.command(main)
