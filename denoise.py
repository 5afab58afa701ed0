"""The one command: medical image files in, denoised files of the same kind out, the student, and a report.

    In    scans/ ...           DICOM, NIfTI, fastMRI, M4Raw or other HDF5, TIFF, PNG, JPEG, .npy, .npz (formats.py)
    Out   clean/...            the same names; clean/diffdenoise/ keeps student.pt and all in between

    In    knee.h5              volumes/<name>/noisy (S,H,W) float32: a dataset of data.py   (--data)
    Out   DIR/denoised.h5      volumes/<name>/pred  (S,H,W) float32, and everything in between; DIR/student.pt
    Out   demo/results.json    {method: {psnr, psnr_sd, ssim, ssim_sd, leak, n}}    demo/report.png    (--demo)

    python denoise.py scans/ --out clean/                           # trains on the scans, denoises them, and reports
    python denoise.py new_scans/ --out new_clean/ --model clean/diffdenoise/student.pt           # seconds
    python denoise.py --data knee.h5 --out DIR --recipe paper --rounds 2
    python denoise.py --demo                                        # 10 minutes on two cores, most of them training

Recipes:

    recorrupted   the noise is measured with the help of a blind-spot network and the posterior update; the student
                  learns from the noisy images and from more of that noise, by recorruption
    paper         blind-spot network, diffusion, SRDS, student of the SRDS mean: Demir, Liu et al.; needs no noise model
    auto          recorrupted, but paper if the images were stored as JPEG: no noise model holds for those (default)

--rounds N goes on from the last result (the paper's Table 4): it is the next round's condition, or the prediction from
which the noise is measured again. The demo adds Gaussian noise of 6/255 to the MNI152 brain once, runs both recipes on
noisy slices of the train split alone, and evaluates on slices of the test split, which no stage has seen.

Of image files, up to 64 million pixels are trained on, chosen at random, and all of them with --std; every file is
denoised. Started again, it goes on where it was interrupted. What cannot be read or written is named in a line and left
out; the rest goes on, and the exit code is 1.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

import apply
import baselines
import bsn
import data
import diffusion
import distill
import evaluate
import formats
import noise
import posterior
import runtime
import srds

LEVEL = "6/255"  # of the demo's Gaussian noise; the paper's
NLM, SINGLE, PAIR = "non-local means, level known", "one sample, 25 steps", "SRDS pair, 25 steps"
OURS, PAPER, BOUND = "student", "student of the paper's recipe", "supervised"


class Pipeline:
    """Runs stages in order; skips those whose output stands, made by the same flags, after stages skipped as well."""

    def __init__(self, folder, mark=None):
        """mark: of the data that all is made from; of other data, nothing that was done counts."""
        self.folder, self.record = folder, folder / "stages.json"
        self.done = json.loads(self.record.read_text()) if self.record.exists() else {}
        if self.done.get("data") != mark:
            self.done = {"data": mark}
        self.changed = False

    def __call__(self, main, out, *flags, trains=None):
        """main([*flags, --out out]) unless it was done before; `trains`: a model whose interrupted training goes on."""
        argv, started = [*map(str, flags), "--out", str(self.folder / out)], (time.monotonic(), time.process_time())
        same = self.done.get(out, {}).get("argv") == argv and not self.changed
        files = [self.folder / out, *([self.folder / trains] if trains else [])]
        if same and self.done[out]["seconds"] is not None and all(file.exists() for file in files):
            return
        self.changed = True  # whatever follows is made anew
        if trains and not same:  # a model of other flags or inputs must not be taken up
            (self.folder / trains).unlink(missing_ok=True)
            runtime.part(self.folder / trains).unlink(missing_ok=True)
        self.note(out, argv, None)  # begun with these flags: only then may it be resumed
        main([*argv, "--resume"] if trains and same else argv)
        self.note(out, argv, round(time.monotonic() - started[0], 1), round(time.process_time() - started[1], 1))

    def note(self, out, argv, seconds, processor=None):
        self.done[out] = dict(argv=argv, seconds=seconds, processor_seconds=processor)
        with runtime.whole(self.record) as temporary:
            temporary.write_text(json.dumps(self.done, indent=1) + "\n")


class Recipe:
    """The stages on one dataset: each method runs some of them, and returns the name of the file that it made."""

    sampling = ()  # flags of srds.py

    def __init__(self, args, folder, dataset, mark=None):
        """mark: see Pipeline."""
        self.args, self.folder = args, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.stage = Pipeline(folder, mark)
        self.data = ["--data", dataset]
        self.common = ["--seed", args.seed, "--device", args.device, "--precision", args.precision]

    def path(self, name):
        return str(self.folder / name)

    def steps(self, module):
        preset = module.PRESETS["fast"]
        steps = max(1, round(self.args.effort * preset["steps"]))
        return ["--steps", steps, "--crop", min(preset["crop"], self.smallest()), *self.common]

    def smallest(self):
        """The shortest side of an image, pixels: no crop can be larger."""
        with data.open_file(self.data[1]) as file:
            return min(min(group["noisy"].shape[1:]) for group in file["volumes"].values())

    def train(self, module, out, model, *flags):
        flags = [*self.data, *flags, "--model", self.path(model), *self.steps(module)]
        self.stage(module.main, out, *flags, trains=model)
        return out

    def blind_spot_network(self):
        """Measures the noise in the noisy images alone, and trains with the blind spot that it asks for."""
        self.model_of_noise = "noise_first.json"
        self.stage(noise.main, self.model_of_noise, "measure", *self.data)
        spot = json.loads((self.folder / self.model_of_noise).read_text())["blind_spot"]
        return self.train(bsn, "bsn_out.h5", "bsn.pt", "--blind-spot", spot)

    def recorrupted(self, estimate, rounds):
        """From a first estimate of the images; returns the files of the last denoised images and student."""
        start, mark = [], ""
        for k in range(1, rounds + 1):
            self.model_of_noise = f"noise{mark}.json"
            self.stage(noise.main, self.model_of_noise, "measure", *self.data, "--pred", self.path(estimate))
            flags = ["--noise", self.path(self.model_of_noise)]
            if k == 1:
                flags_of_posterior = [*self.data, "--pred", self.path(estimate), *flags]
                self.stage(posterior.main, "posterior_out.h5", *flags_of_posterior)
                estimate = "posterior_out.h5"
            out, student = f"recorrupted{mark}_out.h5", f"recorrupted{mark}.pt"
            self.train(distill, out, student, "--target", "recorrupted", "--pred", self.path(estimate), *flags, *start)
            estimate, start, mark = out, ["--init", self.path(student)], f"_round{k + 1}"
        return out, student

    def diffusion(self, estimate, mark=""):
        """Trains the diffusion model conditioned on an estimate; returns the name of its checkpoint."""
        model = f"diffusion{mark}.pt"
        flags = [*self.data, "--cond", self.path(estimate), *self.steps(diffusion)]
        self.stage(train_diffusion, model, *flags, trains=model)
        return model

    def sample(self, estimate, model, out, *flags):
        """Samples from a diffusion model; returns the name of the file."""
        cond = ["--cond", self.path(estimate), "--model", self.path(model)]
        self.stage(srds.main, out, *cond, *self.sampling, *flags, *self.common)
        return out

    def paper(self, estimate, rounds):
        """Like `recorrupted`."""
        mark = ""
        for k in range(1, rounds + 1):
            sampled = self.sample(estimate, self.diffusion(estimate, mark), f"srds{mark}_out.h5")
            out, student = f"paper{mark}_out.h5", f"paper{mark}.pt"
            self.train(distill, out, student, "--target", self.path(sampled))
            estimate, mark = out, f"_round{k + 1}"
        return estimate, student


def train(recipe):
    """Runs the recipe on its dataset: leaves the student and the denoised images. Returns the name of the recipe."""
    args, folder = recipe.args, recipe.folder
    estimate, name = recipe.blind_spot_network(), args.recipe
    if name == "auto":
        model = json.loads((folder / recipe.model_of_noise).read_text())
        name = "paper" if model["compressed"] else "recorrupted"
        print(f"denoise: recipe {name}{': the images were stored as JPEG' if model['compressed'] else ''}", flush=True)
    out, student = getattr(recipe, name)(estimate, args.rounds)
    for made, kept in ((out, "denoised.h5"), (student, "student.pt")):
        with runtime.whole(folder / kept) as temporary:
            shutil.copyfile(folder / made, temporary)
    return name


def report(recipe):
    """Prints what can be told of the denoised images without clean ones."""
    folder, known = recipe.folder, ["--noise", recipe.path(recipe.model_of_noise)]
    print(f"\nThe student: {folder / 'student.pt'}; the dataset, denoised: {folder / 'denoised.h5'}\n")
    try:
        evaluate.main(["--no-reference", *recipe.data, "--pred", recipe.path("denoised.h5"), "--split", "all", *known])
    except ValueError as error:
        print(f"no report: {error}")


def denoise_files(args):
    """Image files in, files of the same kind out, by args.model or by a student trained on them. Returns exit code."""
    out, model, recipe, std = Path(args.out), args.model, None, None
    if model and args.std:
        raise ValueError("--std comes from the posterior update of a training run: a student alone does not know it")
    student = distill.student(model, args.device, args.precision, args.memory) if model else None
    jobs, problems = apply.plan(args.inputs, out, args.key, args.acquisition, args.std)
    work = out / "diffdenoise"
    work.mkdir(parents=True, exist_ok=True)
    if not model:
        model, dataset = work / "student.pt", str(work / "dataset.h5")
        recipe, least = Recipe(args, work, dataset, [job.mark for job in jobs]), bsn.PRESETS["fast"]["crop"]
        everything = ["--std"] if args.std else []
        recipe.stage(lambda argv: apply.collect(jobs, dataset, problems, least, args.std), "dataset.h5", *everything)
        name = train(recipe)
        student = distill.student(model, args.device, args.precision, args.memory)
        if args.std and name == "recorrupted":
            std = deviations(work)
        elif args.std:
            problems.append("--std: only the recipe recorrupted knows the uncertainty, by its posterior update")
    method = f"DiffDenoise {runtime.RELEASE}, student {runtime.fingerprint(model)}"
    written, kept = apply.run(jobs, student, method, work, problems, args.force, std)
    if recipe:
        report(recipe)
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        print(f"denoise.py: left out: {problem}", file=sys.stderr)
    print(f"{written} files written to {out}, {kept} were there already, {len(problems)} left out")
    return 1 if problems else 0


def deviations(work):
    """Callable (job number, volumes) to the posterior's standard deviations in the units of the volumes.

    0 for volumes that were not trained on: constant, or too small.
    """
    std, attrs = data.read_volumes(work / "posterior_out.h5", "std"), data.read_attrs(work / "posterior_out.h5")[1]

    def of(k, volumes):
        names = [f"{k:05d}-{j}" for j in range(len(volumes))]
        return [
            np.asarray(std[name][:]) * abs(attrs[name]["scale"]) if name in std else np.zeros(volume.slices.shape, "f4")
            for name, volume in zip(names, volumes)
        ]

    return of


def demo(args):
    """Both recipes and the supervised bound on the built-in brain; prints and writes the table."""
    folder, started = Path(args.out), time.monotonic()
    recipe = Recipe(args, folder, str(folder / "brain.h5"))
    stage, path, noisy = recipe.stage, recipe.path, recipe.data
    print(f"DiffDenoise demo: built-in brain, Gaussian noise {LEVEL}; everything goes to {folder}/", flush=True)
    stage(data.main, "clean.h5", "import", "--source", "brain")
    flags = ["--kind", "gaussian", "--level", LEVEL, "--seed", args.seed]
    stage(noise.main, "brain.h5", "add", "--data", path("clean.h5"), *flags)
    stage(baselines.main, "nlm_out.h5", *noisy, "--sigma", LEVEL, "--split", "test")
    estimate = recipe.blind_spot_network()
    ours, _ = recipe.recorrupted(estimate, args.rounds)
    paper, _ = recipe.paper(estimate, args.rounds)
    for mode, out in (("single", "single25_out.h5"), ("pair", "srds25_out.h5")):
        recipe.sample(estimate, "diffusion.pt", out, "--steps", 25, "--split", "test", "--mode", mode)
    recipe.train(distill, "supervised_out.h5", "supervised.pt", "--target", "clean")
    rows = {
        NLM: "nlm_out.h5",
        "blind-spot network": "bsn_out.h5",
        SINGLE: "single25_out.h5",
        PAIR: "srds25_out.h5",
        PAPER: paper,
        "blind-spot network, posterior update": "posterior_out.h5",
        OURS: ours,
        BOUND: "supervised_out.h5",
    }
    preds = [f"{name}={path(file)}" for name, file in rows.items()]
    print()
    evaluate.main([*noisy, "--pred", *preds, "--json", path("results.json")])
    shown = {name: path(rows[name]) for name in (NLM, PAIR, PAPER, OURS, BOUND)}
    evaluate.figure(noisy[1], shown, "test", path("report.png"))
    print(f"\n{verdict(json.loads((folder / 'results.json').read_text()))}\n")
    evaluate.main(["--no-reference", *noisy, "--noise", path(recipe.model_of_noise), "--pred", f"student={path(ours)}"])
    seconds = {name: done["seconds"] for name, done in stage.done.items() if name != "data"}
    print(
        f"\nSeconds: {', '.join(f'{name} {s:.0f}' for name, s in seconds.items())}; "
        f"this call {time.monotonic() - started:.0f}. Figure: {path('report.png')}"
    )


def train_diffusion(argv):
    """diffusion.main with the checkpoint as its --out, so that the pipeline sees its output like any other's."""
    at = argv.index("--out")
    diffusion.main([*argv[:at], "--model", argv[at + 1], *argv[at + 2 :]])


def verdict(results):
    """One plain sentence: who wins, and where the student stands."""
    best = max(results, key=lambda name: results[name]["psnr"])

    def gain(a, b):
        return results[a]["psnr"] - results[b]["psnr"]

    return (
        f"Highest PSNR: {best} ({results[best]['psnr']:.2f} dB). Student against noisy {gain(OURS, 'noisy'):+.2f} dB, "
        f"against non-local means {gain(OURS, NLM):+.2f} dB, against the paper's recipe {gain(OURS, PAPER):+.2f} dB, "
        f"against supervised training {gain(OURS, BOUND):+.2f} dB. "
        f"SRDS pair against one sample {gain(PAIR, SINGLE):+.2f} dB."
    )


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("inputs", nargs="*", help=f"{formats.KINDS} files, or folders of them")
    p.add_argument("--data", help="a dataset (.h5) to denoise, instead of image files")
    p.add_argument("--demo", action="store_true", help="the built-in brain, both recipes, and a table")
    p.add_argument("--out", help="folder for everything (default demo with --demo, else denoised)")
    p.add_argument("--model", help="student (.pt) to apply to the files: nothing is trained")
    p.add_argument("--recipe", choices=("auto", "recorrupted", "paper"), default="auto", help="default auto")
    p.add_argument("--rounds", type=runtime.positive, default=1, help="go on from the last result (default 1)")
    p.add_argument("--effort", type=float, default=1.0, help="multiplies the training steps of each stage (default 1)")
    p.add_argument("--std", action="store_true", help="write the uncertainty beside each file, as <name>_std")
    p.add_argument("--force", action="store_true", help="replace files that are there already")
    p.add_argument("--memory", type=runtime.size, default="2G", help="for large images, in bytes (default 2G)")
    p.add_argument("--key", help="dataset in plain HDF5 files that hold more than one")
    p.add_argument("--acquisition", help="only HDF5 files (fastMRI, M4Raw) with this attribute, such as AXT2")
    args = p.parse_args(argv)
    if bool(args.inputs) + bool(args.data) + args.demo != 1:
        raise ValueError("give image files or folders, or --data, or --demo")
    if args.data and (args.model or args.std or args.force or args.key or args.acquisition):
        raise ValueError("--model, --std, --force, --key and --acquisition are for image files, not for --data")
    if not args.effort > 0:
        raise ValueError(f"--effort {args.effort:g} is not positive")
    args.out = args.out or ("demo" if args.demo else "denoised")
    if args.demo:
        return demo(args)
    if args.inputs:
        return denoise_files(args)
    recipe = Recipe(args, Path(args.out), args.data, data.fingerprints(args.data))
    train(recipe)
    report(recipe)


if __name__ == "__main__":
    runtime.command(main)
