"""The one command: medical image files in, denoised files of the same kind out, a trained student, and a report.

    In    scans/ ...           DICOM, NIfTI, fastMRI, M4Raw or other HDF5, TIFF, PNG, JPEG, .npy, .npz (lib/formats)
    Out   clean/...            the same names; clean/report.html, a page with pictures and what can be told of them;
                               clean/diffdenoise/ keeps student.pt and all in between

    In    knee.h5              volumes/<name>/noisy (S,H,W) float32: a dataset of data.py   (--data)
    Out   DIR/denoised.h5      volumes/<name>/pred  (S,H,W) float32, and everything in between; DIR/student.pt

    python denoise.py scans/ --out clean/                           # trains on the scans, denoises them, and reports
    python denoise.py new_scans/ --out new_clean/ --model clean/diffdenoise/student.pt           # seconds
    python denoise.py --data knee.h5 --out DIR --recipe paper --rounds 2
    python denoise.py --demo                                        # the built-in brain: experiments/demo.py

It runs the stages one after the other and prints, before each, the command that would do the same. Recipes:

    tuned     a network of weights/, trained on synthetic volumes alone, denoises at once; with its help the noise is
              measured again, and the network goes on learning from your images by recorruption. Of the two, and of the
              images as they are, the one of least estimated error is kept. --instant stops before the learning;
              so does a run on images that were stored as JPEG, for which no noise model holds. Where noise is stronger
              in some places, or volumes, than in others, images are first divided by a map of it
    scratch   a new student by recorruption; the noise is measured with a blind-spot network and the posterior update
    paper     blind-spot network, diffusion, SRDS, student of the SRDS mean: Demir, Liu et al.; needs no noise model
    auto      (default) tuned; scratch for a --context other than 0 and 2

--rounds N repeats scratch or paper from its own result (the paper's Table 4): the denoised images are the next round's
condition, or the prediction with which the noise is measured again.

Up to 64 million pixels of the image files are trained on, chosen at random; every file is denoised. An interrupted run,
started again, goes on where it stopped; if the data changed, all stages run again. What cannot be read or written is
named in a line and left out; the rest goes on, and the exit code is 1.
"""

import contextlib
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import bsn
import data
import diffusion
import distill
import evaluate
import measure
import noise
import posterior
import srds
from lib import apply, files, record, runtime, training
from lib import report as page
from lib.stages import Stages

# ---------------------------------------------------------------------------------------------------------------
# recipes: the names that they pass on are those of files in the folder
# ---------------------------------------------------------------------------------------------------------------
WEIGHTS = {k: Path(__file__).with_name("weights") / name for k, name in ((0, "images.pt"), (2, "volumes.pt"))}
TUNING_STEPS, TUNING_RATE = 1500, 1e-3
UNEVEN = {0: 0.15, 2: 0.07}  # by context: deviation of the log of the noise's map; where it is alike, 0.10 and 0.06
MAPPED = 0.08  # the same of the map itself, found in some rounds: where the noise is alike at most 0.07
LAWLESS = 0.4  # correlation error of what was removed: good outputs up to 0.1, wrong levels 0.26 (results/report.md)
DOUBT = 0.2  # dB by which a tuned network must seem better: it has learned what is wrong with the law, too
SNAPSHOTS = 4  # of the diffusion model, from which the paper's recipe chooses


def measure_noise(stages, out, *flags):
    """Measures the noise of the dataset; `stages.noise_file` is the latest measurement. Returns the noise model."""
    stages.noise_file = stages.run(measure, *stages.data, *flags, out=out)
    return json.loads((stages.folder / out).read_text())


def estimate(stages, flags, out):
    """evaluate.main with these flags; returns what it wrote to `out` (.json), such as estimated PSNRs."""
    flags = [*map(str, [*flags, *stages.common]), "--json", stages.path(out)]
    stages.once(evaluate.main, flags, out, f"python evaluate.py {shlex.join(flags)}")
    return json.loads((stages.folder / out).read_text())


def blind_spot_estimate(stages):
    """A first estimate of the images, by a network with the blind spot that their noise asks for. Returns its file."""
    noise_model = measure_noise(stages, "noise_first.json")
    flags = ["--blind-spot", noise_model["blind_spot"]]
    flags += ["--hole", "all"] if any(noise_model["through"]) else []
    return stages.train(bsn, *flags, out="bsn_out.h5", model="bsn.pt")


def learn(stages, start, noise_file, steps, *flags, name):
    """Recorruption from a student on, told that noise; with 0 steps it is only told. Returns the name of its images."""
    known = ["--target", "recorrupted", "--noise", noise_file, "--init", start, "--steps", steps, *flags]
    known += ["--crop", stages.crop(distill)]
    return stages.run(distill, *stages.data, *known, *stages.common, out=f"{name}_out.h5", model=f"{name}.pt")


def tuned_recipe(stages):
    """From a shipped network: it, what it becomes by learning from the noisy images, or the images as they are.

    best.json has the estimated PSNR of each. Returns (images, student) as the others.
    """
    few, as_they_came = ["--ensemble", 1] if getattr(stages.args, "instant", False) else [], stages.data
    first = look(stages)
    if even_out(stages, first):
        first = look(stages, "_even")
    jpeg = measure_noise(stages, "noise.json", "--pred", stages.path(f"{first}_out.h5"))["compressed"]
    start, known = stages.path(f"{first}.pt"), stages.path("noise.json")
    students = {"shipped network": start}
    if jpeg and not few:
        print("denoise: stored as JPEG: no noise model holds, from which to learn: the shipped network", flush=True)
    if not (jpeg or few):
        steps = max(1, round(stages.args.effort * TUNING_STEPS))
        flags = ["--planes", "--pred", stages.path(f"{first}_out.h5"), "--lr", TUNING_RATE]
        learn(stages, start, known, steps, *flags, name="tuned")
        students["tuned network"] = stages.path("tuned.pt")
    flags = ["--no-reference", *stages.data, "--split", "all", "--noise", known]
    flags += ["--model", *(f"{name}={path}" for name, path in students.items())]
    found = estimate(stages, flags, "best.json")
    best = max(found, key=lambda k: found[k]["psnr"] - found[k].get("sd", 0) - DOUBT * (k == "tuned network"))
    kept = "images as they are" if best == "noisy" else best
    print(f"denoise: kept the {kept}: estimated PSNR {found[best]['psnr']:.2f} dB", flush=True)
    images, student = "tuned_out.h5", "tuned.pt"
    if best != "tuned network":
        law, also = ("none", []) if best == "noisy" else (known, ["--planes"])
        learn(stages, start, law, 0, *also, *few, name="shipped")
        images, student = "shipped_out.h5", "shipped.pt"
    law = noise.parse_noise_model(known)
    if best != "noisy" and (off := evaluate.correlation_error(stages.data[1], stages.path(images), law)) > LAWLESS:
        print(f"denoise: no, the images as they are: what was removed is not correlated as noise is (off by {off:.2f})")
        learn(stages, start, "none", 0, *few, name="untouched")
        best, images, student = "noisy", "untouched_out.h5", "untouched.pt"
    evaluate.write_json({name: one | {"kept": name == best} for name, one in found.items()}, stages.path("best.json"))
    if stages.data != as_they_came:
        flags, stages.judged = [*stages.data, "--pred", stages.path(images), "--like", as_they_came[1]], images
        images = stages.run(noise, "multiply", *flags, out="multiplied_out.h5")
    return images, student


def look(stages, suffix=""):
    """A first measurement of the noise, and what the shipped network makes of the images. Returns the latter's name."""
    name = f"instant{suffix}"
    measure_noise(stages, f"noise_first{suffix}.json")
    learn(stages, shipped(stages), stages.path(stages.noise_file), 0, "--ensemble", 1, name=name)
    return name


def even_out(stages, first):
    """Where the noise differs from place to place, the stages go on with images divided by its map.

    first: name of the student with whose help that is seen, on eight slices. Returns whether it was so.
    """
    if given := getattr(stages.args, "noise_map", None):
        return divide(stages, given)
    flags = ["--no-reference", *stages.data, "--split", "all", "--noise", stages.path(stages.noise_file)]
    flags += ["--model", f"shipped={stages.path(first)}.pt"]
    seen = estimate(stages, [*flags, "--slices", 8], "first.json")
    context = training.load_checkpoint(f"{stages.path(first)}.pt")["model_args"].get("context", 0)
    form = noise.form(json.loads((stages.folder / stages.noise_file).read_text()))
    if seen["shipped"]["uneven"] < UNEVEN[context] + 0.04 * (form != "gaussian"):  # alike, and correlated: up to 0.096
        return False
    estimate(stages, [*flags, "--slices", 8, "--noise-map-out", stages.path("map.h5")], "map.json")
    gains = data.read_volumes(stages.path("map.h5"), "gain").values()
    if np.concatenate([np.log(gain).ravel() for gain in gains]).std() < MAPPED:
        return False
    return divide(stages, stages.path("map.h5"))


def divide(stages, path):
    """From here on, the stages see images that are divided by the map at `path`. Returns True."""
    even = stages.run(noise, "divide", *stages.data, "--map", path, out="even.h5")
    stages.data = ["--data", stages.path(even)]
    print("denoise: the noise is stronger in some places than in others: from here on, images are divided by its map")
    return True


def shipped(stages):
    """Path of the network in weights/ for the dataset: for volumes, or for single images."""
    noisy = data.read_volumes(stages.data[1], "noisy")
    context = data.choose_context(getattr(stages.args, "context", "auto"), noisy, "denoise")
    return os.path.relpath(WEIGHTS[context])  # so that the commands which are printed name no folder of this machine


def recorrupted_recipe(stages, estimate, rounds=1):
    """Beyond the paper: the student learns from the noisy images and more of their noise. Returns (images, student)."""
    start, suffix = [], ""
    for k in range(1, rounds + 1):
        measure_noise(stages, f"noise{suffix}.json", "--pred", stages.path(estimate))
        known = ["--noise", stages.path(stages.noise_file)]
        if k == 1:
            flags = [*stages.data, "--pred", stages.path(estimate), *known]
            estimate = stages.run(posterior, *flags, out="posterior_out.h5")
        flags, student = ["--pred", stages.path(estimate), *known, *start], f"recorrupted{suffix}.pt"
        out = f"recorrupted{suffix}_out.h5"
        estimate = stages.train(distill, "--target", "recorrupted", *flags, out=out, model=student)
        start, suffix = ["--init", stages.path(student)], f"_round{k + 1}"
    return estimate, student


def paper_recipe(stages, estimate, rounds=1):
    """The paper: diffusion conditioned on the estimate, SRDS, student of the SRDS mean. Returns (images, student)."""
    suffix = ""
    for k in range(1, rounds + 1):
        target = sample(stages, estimate, conditional_model(stages, estimate, suffix), f"srds{suffix}_out.h5")
        flags, student = ["--target", stages.path(target)], f"paper{suffix}.pt"
        estimate = stages.train(distill, *flags, out=f"paper{suffix}_out.h5", model=student)
        suffix = f"_round{k + 1}"
    return estimate, student


def conditional_model(stages, estimate, suffix=""):
    """Trains a diffusion model conditioned on the estimate. Returns its name, or that of its best snapshot."""
    keep = [] if suffix else ["--snapshots", SNAPSHOTS]  # in a later round no network leads from y to the condition
    model = stages.train(diffusion, "--cond", stages.path(estimate), *keep, model=f"diffusion{suffix}.pt")
    return best_snapshot(stages) if keep else model


def best_snapshot(stages):
    """The snapshot of diffusion.pt whose pair, conditioned on the blind-spot network's estimate, errs least.

    Detail comes back before the noise of the condition does (results/curves): longer training can be worse. The error
    is Stein's estimate, with the noise as it was first measured; stopping.json has it. Without a noise model (JPEG)
    the last snapshot stands.
    """
    known = stages.noise_file
    if json.loads((stages.folder / known).read_text())["compressed"]:
        return "diffusion.pt"
    model = stages.path("diffusion.pt")
    steps = training.load_checkpoint(model)["args"]["steps"]
    names = {path.stem: path.name for path in training.snapshots(model, steps, SNAPSHOTS).values()}
    flags = ["--no-reference", *stages.data, "--split", "all", "--noise", stages.path(known)]
    flags += ["--slices", 4, "--model", *(f"{k}={stages.path('bsn.pt')}+{stages.path(v)}" for k, v in names.items())]
    found = estimate(stages, flags, "stopping.json")
    best = max(names, key=lambda name: found[name]["psnr"])
    print(f"denoise: kept {best}: estimated PSNR of its pair {found[best]['psnr']:.2f} dB", flush=True)
    return names[best]


def sample(stages, estimate, model, out, *flags):
    """Samples from a diffusion model conditioned on the estimate; returns the name of the file."""
    condition = ["--cond", stages.path(estimate), "--model", stages.path(model)]
    return stages.run(srds, *condition, *stages.sampling, *flags, *stages.common, out=out)


RECIPES = {"scratch": recorrupted_recipe, "paper": paper_recipe}


def choose_recipe(stages, recipe):
    """The recipe to run: the one asked for or, for `auto`, the one that suits; says which, and why."""
    auto, other = recipe == "auto", getattr(stages.args, "context", "auto") not in ("auto", *WEIGHTS)
    none = f": weights/ has networks of context {' and '.join(map(str, WEIGHTS))}" if other else ""
    if auto:
        recipe = "scratch" if other else "tuned"
        print(f"denoise: recipe {recipe}{none}", flush=True)
    elif recipe == "tuned" and other:
        raise ValueError(f"--recipe tuned --context {stages.args.context}{none}")
    for flag in ("instant", "noise_map") if auto and recipe != "tuned" else ():
        if getattr(stages.args, flag, None):
            raise ValueError(f"--{flag.replace('_', '-')} is for the recipe tuned, not {recipe}{none}")
    return recipe


def train(stages, recipe, rounds):
    """Runs a recipe; leaves denoised.h5 and student.pt in the folder. Returns the name of the recipe that was run."""
    recipe = choose_recipe(stages, recipe)
    if recipe == "tuned" and rounds > 1:
        raise ValueError(f"--rounds {rounds} is for the recipes scratch and paper: tuned has one")
    if recipe == "tuned":
        images, student = tuned_recipe(stages)
    else:
        images, student = RECIPES[recipe](stages, blind_spot_estimate(stages), rounds)
    for made, kept in ((images, "denoised.h5"), (student, "student.pt")):
        with runtime.atomic_write(stages.folder / kept) as temporary:
            shutil.copyfile(stages.folder / made, temporary)
    return recipe


def report(stages):
    """Prints what can be told of the denoised images without clean ones."""
    print(f"\nThe student: {stages.path('student.pt')}; the dataset, denoised: {stages.path('denoised.h5')}\n")
    flags = ["--pred", f"denoised={stages.path(stages.judged)}", "--split", "all"]
    flags += ["--noise", stages.path(stages.noise_file)]
    try:
        evaluate.main(["--no-reference", *stages.data, *flags])
    except ValueError as error:
        print(f"no report: {error}")


# ---------------------------------------------------------------------------------------------------------------
# image files
# ---------------------------------------------------------------------------------------------------------------
def train_on_files(args, jobs, work, problems):
    """Makes a dataset of the image files and trains on it. Returns (stages, name of the recipe)."""
    dataset, crop = work / "dataset.h5", bsn.PRESETS["fast"]["crop"]
    given = [files.digest([args.noise_map])] if args.noise_map else []
    stages = Stages(work, dataset, args, [*(job.digest for job in jobs), *given])

    def write(argv):
        volumes = files.training_volumes(jobs, problems, crop, args.force)
        data.write_dataset(dataset, volumes, [1.0, 0, 0], {})

    imported = ["import", *map(str, args.inputs), "--split", "train", "--out", str(dataset)]
    stages.once(write, [], dataset.name, f"python data.py {shlex.join(imported)}")
    return stages, train(stages, args.recipe, args.rounds)


def student_of(args, work, jobs=None, problems=None):
    """The denoiser of a run over files: --model or, of `jobs`, a student trained on them.

    Returns (student, its file, its ensemble, noise model or None, stages or None, name of the recipe).
    """
    ensemble = args.ensemble or (1 if args.model or args.instant else 8)
    load = functools.partial(distill.student, ensemble=ensemble, std=args.std)
    options = args.device, args.precision, args.memory or 2 << 30
    if args.model:
        student = load(Path(args.model), *options)
        return student, Path(args.model), ensemble, student.noise_model, None, "none: --model"
    apply.check_room(jobs, work, args.force)
    stages, recipe = train_on_files(args, jobs, work, problems)
    student = load(work / "student.pt", *options)
    law = student.noise_model if recipe == "paper" else json.loads((work / stages.noise_file).read_text())
    return student, work / "student.pt", ensemble, law, stages, recipe


def wanted_of(args, student, law, stages, ensemble):
    """apply.Wanted of a run over files. Raises ValueError where the noise model, law, does not tell what is asked."""
    if args.noise_map_out and args.model and not law:
        raise ValueError(f"--noise-map-out: {args.model} knows no noise model")
    if args.bias_correct and not (law and law.get("air")):
        raise ValueError("--bias-correct: the noise model knows no air: no magnitude images, or none without signal")
    if args.samples and not student.noise_model:
        raise ValueError(f"--samples: {args.model or 'the student'} knows no noise model")
    wanted = evaluate.wanted(student, law, args.noise_map_out, args.bias_correct, args.samples)
    if args.noise_map:
        gains = files.given_map(args.noise_map)
        wanted["noise_map"] = lambda volume: gains(volume.shape)
    if stages and not args.std and stages.judged == "denoised.h5" and ensemble == (1 if args.instant else 8):
        wanted["made"] = data.by_content(stages.path("denoised.h5"), stages.data[1])
    return apply.Wanted(**wanted)


def denoise_files(args, held):
    """Image files in, files of the same kind out, by args.model or by a student trained on them. Returns exit code.

    held: a contextlib.ExitStack, for what is let go of at the end.
    """
    out, work, began = Path(args.out), Path(args.out) / "diffdenoise", time.monotonic()
    share, tell = record.share_of(args.share, args.model), record.teller(args.json)
    asked = dict(std=args.std, removed=args.removed, noise=args.noise_map_out)
    sides = [name for name in asked if asked[name]] + [f"sample{k + 1}" for k in range(args.samples)]
    if args.noise_map:
        files.given_map(args.noise_map)  # what is given is refused before anything is written
    found = student_of(args, work) if args.model else None
    jobs, problems = files.plan(args.inputs, out, args.key, args.acquisition, sides, args.bids, share)
    held.enter_context(record.lock(work, share))
    student, path, ensemble, law, stages, recipe = found or student_of(args, work, jobs, problems)
    wanted = wanted_of(args, student, law, stages, ensemble)
    method = f"DiffDenoise {runtime.RELEASE}, student {training.fingerprint(path)}, ensemble of {ensemble}"
    method += ", bias corrected" if args.bias_correct else ""
    method += f", noise map {files.digest([args.noise_map])}" if args.noise_map else ""
    told = dict(Method=method, Parameters={"Ensemble": ensemble}, NoiseModel=student.noise_model)
    tools, rows = evaluate.report_tools(law, student, uneven=bool(wanted.noise_map)), {}
    stop, look = held.enter_context(runtime.stoppable("this file")), functools.partial(page.look, rows, tools)
    run = apply.Run(args.force, share, stop, tell, told, look)
    counts = apply.denoise_files(jobs, student, method, work, problems, wanted, run)
    if stages and not stop:
        report(stages)
    shown = out / f"report{record.suffix(share)}.html"
    if not stop and (counts[0] or not shown.exists()):
        ran = dict(recipe=recipe, student=training.fingerprint(path), seconds=f"{time.monotonic() - began:.0f}")
        facts = page.facts_of(args, ran, work if stages else None)
        problems = page.of_run(shown, jobs, rows, tools, facts, problems, args.with_names)
    return record.finish(out, *counts, problems, stop, tell)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("inputs", nargs="*", help=f"{files.KINDS} files, or folders of them")
    p.add_argument("--data", help="a dataset (.h5) to denoise, instead of image files")
    p.add_argument("--demo", action="store_true", help="the built-in brain, both recipes, and a table")
    p.add_argument("--out", help="folder for everything (default demo with --demo, else denoised)")
    p.add_argument("--model", help="student (.pt) to apply to the files: nothing is trained")
    p.add_argument("--recipe", choices=("auto", "tuned", *RECIPES), default="auto", help="default auto")
    p.add_argument("--instant", action="store_true", help="recipe tuned without its training: seconds, not minutes")
    p.add_argument("--rounds", type=runtime.positive, default=1, help="repeat from the last result (default 1)")
    p.add_argument("--effort", type=float, default=1.0, help="multiplies the training steps of each stage (default 1)")
    training.context_flag(p)
    p.add_argument("--ensemble", type=int, choices=(1, 8), help="mean over 8 symmetries (default 8; 1 with --model)")
    p.add_argument("--std", action="store_true", help="write the uncertainty beside each file, as <name>_std")
    p.add_argument("--samples", type=runtime.positive, default=0, metavar="N", help="write N possible clean images")
    p.add_argument("--bias-correct", action="store_true", help="magnitude images: take off what noise adds where dark")
    p.add_argument("--removed", action="store_true", help="write noisy - denoised beside each file, as <name>_removed")
    p.add_argument("--noise-map", metavar="FILE", help="image of the noise's deviation, instead of a measured map")
    p.add_argument("--noise-map-out", action="store_true", help="write the noise's deviation, as <name>_noise")
    p.add_argument("--bids", action="store_true", help="BIDS in, BIDS derivatives out: names, JSON files")
    p.add_argument("--share", metavar="K/N", help="denoise only the K-th of N shares of the files; needs --model")
    p.add_argument("--json", action="store_true", help="print a line of JSON for each file, and all else to stderr")
    p.add_argument("--with-names", action="store_true", help="name files and folders in report.html")
    p.add_argument("--force", action="store_true", help="replace files, and denoise masks and label maps")
    p.add_argument("--memory", type=runtime.size, help="for large images, in bytes (default 2G)")
    p.add_argument("--key", help="dataset in plain HDF5 files that hold more than one")
    p.add_argument("--acquisition", help="only HDF5 files (fastMRI, M4Raw) with this attribute, such as AXT2")
    args = p.parse_args(argv)
    if bool(args.inputs) + bool(args.data) + args.demo != 1:
        raise ValueError("give image files or folders, or --data, or --demo")
    named = ["model", "std", "samples", "removed", "noise_map", "noise_map_out", "bias_correct", "bids", "share"]
    named += ["json", "with_names", "force", "key", "acquisition", "ensemble", "memory"]
    given = [f"--{name}".replace("_", "-") for name in named if getattr(args, name)]
    if given and not args.inputs:
        raise ValueError(f"{', '.join(given)}: these are for image files alone")
    if args.instant and (args.model or args.recipe not in ("auto", "tuned")):
        raise ValueError("--instant is for the recipe tuned, without --model")
    if args.noise_map and args.recipe not in ("auto", "tuned"):
        raise ValueError("--noise-map is for the recipe tuned")
    lawless = ("std", "samples", "noise_map_out", "bias_correct") if args.recipe == "paper" else ()
    if asked := [f"--{name}".replace("_", "-") for name in lawless if getattr(args, name)]:
        raise ValueError(f"{', '.join(asked)}: the recipe paper has no noise model, from which it would follow")
    if not 0 < args.effort < float("inf"):
        raise ValueError(f"--effort {args.effort:g} is not a positive number")
    given = [f"--{n}" for n in ("recipe", "rounds", "effort", "context") if getattr(args, n) != p.get_default(n)]
    if given and args.model:
        raise ValueError(f"{', '.join(given)}: for training, and with --model nothing is trained")
    args.out = args.out or ("demo" if args.demo else "denoised")
    if args.demo:
        common = ["--out", args.out, "--rounds", args.rounds, "--effort", args.effort, "--seed", args.seed]
        common += ["--device", args.device, "--precision", args.precision]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        return subprocess.call([sys.executable, "-m", "experiments.demo", *map(str, common)], env=env)
    with contextlib.ExitStack() as held:
        if args.json:
            args.json = sys.stdout
            held.enter_context(contextlib.redirect_stdout(sys.stderr))
        if args.inputs:
            return denoise_files(args, held)
        if Path(args.data).resolve().parent == Path(args.out).resolve():
            raise ValueError(f"--out {args.out} is the folder of the input {args.data}: give another folder")
        digest = data.fingerprints(args.data)
        held.enter_context(record.lock(Path(args.out)))
        stages = Stages(Path(args.out), args.data, args, digest)
        train(stages, args.recipe, args.rounds)
        report(stages)


if __name__ == "__main__":
    runtime.command(main)
