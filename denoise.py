"""The one command: every stage in order, on real images, with an honest table at the end.

    Out   demo/brain.h5        clean and noisy slices of the built-in brain
          demo/*_out.h5        what each stage and each rival predicted     demo/*.pt, *.jsonl   models and logs
          demo/results.json    {method: {psnr, psnr_sd, ssim, ssim_sd, leak, n}}    demo/report.png

    python denoise.py --demo                    # 8 minutes on two cores, most of them training
    python denoise.py --demo --out other        # started again, it goes on where it was interrupted

The demo adds Gaussian noise of 6/255 to the MNI152 brain once, trains every stage on noisy slices of the train split
alone, and evaluates on slices of the test split, which no stage has seen. Both splits are contiguous blocks.
"""

import json
import time
from pathlib import Path

import baselines
import bsn
import data
import diffusion
import distill
import evaluate
import noise
import runtime
import srds

LEVEL = "6/255"  # of the demo's Gaussian noise; the paper's
NLM, SINGLE, PAIR = "non-local means, level known", "one sample, 25 steps", "SRDS pair, 25 steps"


class Pipeline:
    """Runs stages in order; skips those whose output stands, made by the same flags, after stages skipped as well."""

    def __init__(self, folder):
        self.folder, self.record = folder, folder / "stages.json"
        self.done = json.loads(self.record.read_text()) if self.record.exists() else {}
        self.changed = False

    def __call__(self, main, out, *flags, trains=None):
        """main([*flags, --out out]) unless it was done before; `trains`: a model whose interrupted training goes on."""
        argv, started = [*map(str, flags), "--out", str(self.folder / out)], time.monotonic()
        same = self.done.get(out, {}).get("argv") == argv and not self.changed
        if same and self.done[out]["seconds"] is not None and (self.folder / out).exists():
            return
        self.changed = True  # whatever follows is made anew
        if trains and not same:  # a model of other flags or inputs must not be taken up
            (self.folder / trains).unlink(missing_ok=True)
            runtime.part(self.folder / trains).unlink(missing_ok=True)
        self.note(out, argv, None)  # begun with these flags: only then may it be resumed
        main([*argv, "--resume"] if trains and same else argv)
        self.note(out, argv, round(time.monotonic() - started, 1))

    def note(self, out, argv, seconds):
        self.done[out] = dict(argv=argv, seconds=seconds)
        with runtime.whole(self.record) as temporary:
            temporary.write_text(json.dumps(self.done, indent=1) + "\n")


def demo(args):
    """All stages on the built-in brain; prints and writes the table."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    stage, started = Pipeline(folder), time.monotonic()
    path = lambda name: str(folder / name)  # noqa: E731
    common = ["--seed", args.seed, "--device", args.device, "--precision", args.precision]

    def steps(module):
        return ["--preset", "fast", "--steps", max(1, round(args.effort * module.PRESETS["fast"]["steps"])), *common]

    print(f"DiffDenoise demo: built-in brain, Gaussian noise {LEVEL}; everything goes to {folder}/", flush=True)
    stage(data.main, "clean.h5", "import", "--source", "brain")
    stage(
        noise.main,
        "brain.h5",
        "add",
        "--data",
        path("clean.h5"),
        "--kind",
        "gaussian",
        "--level",
        LEVEL,
        "--seed",
        args.seed,
    )
    noisy = ["--data", path("brain.h5")]
    stage(baselines.main, "nlm_out.h5", *noisy, "--sigma", LEVEL, "--split", "test")
    stage(bsn.main, "bsn_out.h5", *noisy, "--model", path("bsn.pt"), *steps(bsn), trains="bsn.pt")
    cond = ["--cond", path("bsn_out.h5"), "--model", path("diffusion.pt")]
    stage(
        train_diffusion, "diffusion.pt", *noisy, "--cond", path("bsn_out.h5"), *steps(diffusion), trains="diffusion.pt"
    )
    stage(srds.main, "srds_out.h5", *cond, *common)
    stage(srds.main, "single25_out.h5", *cond, "--mode", "single", "--steps", 25, "--split", "test", *common)
    stage(srds.main, "srds25_out.h5", *cond, "--mode", "pair", "--steps", 25, "--split", "test", *common)
    stage(
        distill.main,
        "distill_out.h5",
        *noisy,
        "--target",
        path("srds_out.h5"),
        "--model",
        path("student.pt"),
        *steps(distill),
        trains="student.pt",
    )
    rows = {
        NLM: "nlm_out.h5",
        "blind-spot network": "bsn_out.h5",
        SINGLE: "single25_out.h5",
        PAIR: "srds25_out.h5",
        "student": "distill_out.h5",
    }
    print()
    evaluate.main(
        [
            *noisy,
            "--pred",
            *(f"{name}={path(file)}" for name, file in rows.items()),
            "--json",
            path("results.json"),
            "--figure",
            path("report.png"),
        ]
    )
    print(f"\n{verdict(json.loads((folder / 'results.json').read_text()))}")
    seconds = {name: done["seconds"] for name, done in stage.done.items()}
    print(
        f"Seconds: {', '.join(f'{name} {s:.0f}' for name, s in seconds.items())}; "
        f"this call {time.monotonic() - started:.0f}. Figure: {path('report.png')}"
    )


def train_diffusion(argv):
    """diffusion.main with the checkpoint as its --out, so that the pipeline sees its output like any other's."""
    at = argv.index("--out")
    diffusion.main([*argv[:at], "--model", argv[at + 1], *argv[at + 2 :]])


def verdict(results):
    """One plain sentence: who wins, and where the student and the pair stand."""
    best = max(results, key=lambda name: results[name]["psnr"])

    def gain(a, b):
        return results[a]["psnr"] - results[b]["psnr"]

    return (
        f"Highest PSNR: {best} ({results[best]['psnr']:.2f} dB). "
        f"Student against noisy {gain('student', 'noisy'):+.2f} dB, "
        f"against non-local means {gain('student', NLM):+.2f} dB; pair against one sample {gain(PAIR, SINGLE):+.2f} dB."
    )


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("--demo", action="store_true", required=True, help="the built-in brain, all stages, and a table")
    p.add_argument("--out", default="demo", help="folder for everything (default demo)")
    p.add_argument("--effort", type=float, default=1.0, help="multiplies the training steps of each stage (default 1)")
    args = p.parse_args(argv)
    if not args.effort > 0:
        raise ValueError(f"--effort {args.effort:g} is not positive")
    demo(args)


if __name__ == "__main__":
    runtime.command(main)
