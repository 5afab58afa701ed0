"""Our recipe, the paper's and their rivals on the built-in brain: a table, a figure and a verdict, without any data.

    Out   demo/results.json    {method: {psnr, psnr_sd, ssim, ssim_sd, leak, n, p}}
          demo/report.png      one test slice: every method, a zoom, its error
          demo/...             the files of all stages, stages.json

    python -m experiments.demo                      # minutes on two cores, most of them training
    python -m experiments.demo --seed 1 --out demo1

Gaussian noise of 6/255 is added once to the MNI152 brain. Everything but the supervised bound is trained on the noisy
slices of the train split alone; the table is of the test split, which no stage has seen. Each network of the paper's
recipe has SHARE of its default training, the supervised student as many steps as the tuned one has. An interrupted run,
started again, goes on where it stopped.
"""

import json
import time
from argparse import Namespace
from pathlib import Path

import data
import denoise
import distill
import evaluate
import noise
from experiments import baselines
from lib import runtime
from lib.stages import Stages

LEVEL = "6/255"  # of the Gaussian noise: the paper's
NLM, SINGLE, PAIR = "non-local means, level known", "one sample, 10 steps", "SRDS pair, 10 steps"
INSTANT, OURS, PAPER, BOUND = "shipped network, instant", "tuned", "student of the paper's recipe", "supervised"
SHARE = 0.4


def run_methods(stages, args):
    """Makes the noisy brain and runs every method on it. Returns {name in the table: prediction file}."""
    some = ["--slices", args.slices] if args.slices else []
    stages.run(data, "import", "--source", "brain", *some, out="clean.h5")
    flags = ["--kind", "gaussian", "--level", LEVEL, "--seed", args.seed]
    stages.run(noise, "add", "--data", stages.path("clean.h5"), *flags, out="brain.h5")
    stages.run(baselines, *stages.data, "--sigma", LEVEL, "--split", "test", out="nlm_out.h5")
    ours, _ = denoise.tuned_recipe(stages)
    flags = ["--planes", "--ensemble", 1, "--split", "test"]  # as with --instant
    at_once = denoise.learn(stages, stages.path("instant.pt"), stages.path("noise.json"), 0, *flags, name="at_once")
    steps = ["--steps", max(1, round(args.effort * denoise.TUNING_STEPS)), "--crop", stages.crop(distill)]
    flags = [*stages.data, "--target", "clean", "--split", "test", *steps, *stages.common]
    bound = stages.run(distill, *flags, out="supervised_out.h5", model="supervised.pt")
    stages.args = Namespace(**{**vars(args), "effort": SHARE * args.effort})
    estimate = denoise.blind_spot_estimate(stages)
    paper, _ = denoise.paper_recipe(stages, estimate, args.rounds)
    for mode, out in (("single", "single10_out.h5"), ("pair", "srds10_out.h5")):
        denoise.sample(stages, estimate, "diffusion.pt", out, "--steps", 10, "--split", "test", "--mode", mode)
    files = {NLM: "nlm_out.h5", "blind-spot network": "bsn_out.h5"}
    files |= {SINGLE: "single10_out.h5", PAIR: "srds10_out.h5", PAPER: paper}
    files |= {INSTANT: at_once, OURS: ours, BOUND: bound}
    return {name: stages.path(file) for name, file in files.items()}


def verdict(results):
    """One plain sentence: who wins, and how far the student is from the others."""
    best = max(results, key=lambda name: results[name]["psnr"])

    def gain(a, b):
        return results[a]["psnr"] - results[b]["psnr"]

    return (
        f"Highest PSNR: {best} ({results[best]['psnr']:.2f} dB). Tuned against noisy {gain(OURS, 'noisy'):+.2f} dB, "
        f"against the shipped network {gain(OURS, INSTANT):+.2f} dB, "
        f"against non-local means {gain(OURS, NLM):+.2f} dB, against the paper's recipe {gain(OURS, PAPER):+.2f} dB, "
        f"against supervised training {gain(OURS, BOUND):+.2f} dB. "
        f"SRDS pair against one sample {gain(PAIR, SINGLE):+.2f} dB."
    )


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("--out", default="demo", help="folder for everything (default demo)")
    p.add_argument("--rounds", type=runtime.positive, default=1, help="rounds of the paper's recipe (default 1)")
    p.add_argument("--effort", type=float, default=1.0, help="multiplies the training steps of each stage (default 1)")
    p.add_argument("--slices", type=runtime.positive, help="only so many slices in the middle of the brain, to try it")
    args = p.parse_args(argv)
    if not args.effort > 0:
        raise ValueError(f"--effort {args.effort:g} is not positive")
    began = time.monotonic()
    print(f"DiffDenoise demo: built-in brain, Gaussian noise {LEVEL}; everything goes to {args.out}/", flush=True)
    stages = Stages(Path(args.out), Path(args.out) / "brain.h5", args)
    files = run_methods(stages, args)
    dataset, results, figure = (stages.path(name) for name in ("brain.h5", "results.json", "report.png"))
    print()
    preds = [f"{name}={file}" for name, file in files.items()]
    evaluate.main(["--data", dataset, "--pred", *preds, "--json", results])
    evaluate.figure(dataset, {name: files[name] for name in (NLM, PAPER, INSTANT, OURS, BOUND)}, "test", figure)
    print(f"\n{verdict(json.loads(Path(results).read_text()))}\n")
    known = ["--noise", stages.path(stages.noise_file)]
    evaluate.main(["--no-reference", "--data", dataset, *known, "--pred", f"tuned={files[OURS]}"])
    seconds = [f"{name} {done['seconds']:.0f}" for name, done in stages.done.items() if name != "data"]
    print(f"\nSeconds: {', '.join(seconds)}; this call {time.monotonic() - began:.0f}. Figure: {figure}")


if __name__ == "__main__":
    runtime.command(main)
