"""Tables and figures: PSNR, SSIM and noise leak of prediction files against the clean images, or without clean ones.

    In    knee.h5               volumes/<name>/clean and noisy  (S,H,W) float32
          bsn_out.h5 ...        volumes/<name>/pred             (S,H,W) float32, made from knee.h5
    Out   a Markdown table; --json results.json {method: {psnr, psnr_sd, ssim, ssim_sd, leak, n, p}};
          --figure report.png

    python evaluate.py --data knee.h5 --pred bsn_out.h5 srds_out.h5 --json results.json --figure report.png
    python evaluate.py --data knee.h5 --pred BSN=bsn_out.h5 "SRDS pair=srds_out.h5"        # names of your own
    python evaluate.py --no-reference --data knee.h5 --pred distill_out.h5                 # there is no clean image
    python evaluate.py --no-reference --data knee.h5 --model student.pt                    # its PSNR, estimated

PSNR and SSIM are scikit-image's, data_range 1, SSIM's window 7x7, slice by slice; nothing is clipped or rounded first.
Leak = <output - x, n> / <n, n> with x clean and n = noisy - x: the share of the noise that is still there. It is 0 for
an output that has not seen the noise of its own pixel, 1 for the noisy image.

Without a clean image, the noise model (noise.py) says what y - output should look like if it were only noise:

    removed, correlation error, structure     see lib/residual.py
    PSNR         estimated, for what can be run again (--model): Stein's unbiased risk estimate (`estimated_error`)
    error        estimated root mean square error: from the file's `std` where a stage has one (posterior.py); for a
                 blind-spot network sqrt(|y - output|^2 - s2), by J-invariance
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import interp1d
from scipy.ndimage import gaussian_filter

import bsn
import data
import distill
import measure
import noise
import posterior
import srds
from lib import formats, panels, report, residual, runtime
from lib.residual import verdict
from lib.scores import PROTOCOL, comparisons, leak, markdown, psnr_ssim, summary  # noqa: F401  used from here


def score(path, pred, split):
    """{"psnr", "ssim", "leak": (n,)} of each slice of the prediction file `pred`, or of the noisy images if it is None.

    Raises ValueError if a volume is missing, or no slice has any noise.
    """
    clean, noisy = data.read_volumes(path, "clean", split), data.read_volumes(path, "noisy", split)
    out = noisy if pred is None else data.read_matching(pred, path, split=split)
    missing = [name for name in clean if name not in out]
    if missing:
        raise ValueError(f"{pred} lacks volume {missing[0]!r} of the {split} split of {path}")
    rows = [
        (*psnr_ssim(out[name][s], x[s]), leak(out[name][s], x[s], noisy[name][s]))
        for name, x in clean.items()
        for s in range(x.shape[0])
        if np.any(noisy[name][s] != x[s])  # a black slice has no Poisson or Gamma noise: nothing to measure
    ]
    if not rows:
        raise ValueError(f"no slice of the {split} split of {path} has any noise: noisy and clean are equal")
    return dict(zip(("psnr", "ssim", "leak"), np.array(rows).T))


def calibration(path, pred, split):
    """How many clean pixels lie within one and two `std` of a prediction: [(low, high, share, share)] by intensity.

    Four ranges of clean intensity with as many pixels each; 0.68 and 0.95 would be right for Gaussian errors.
    """
    clean = data.read_volumes(path, "clean", split)
    mean, std = (data.read_matching(pred, path, key, split=split) for key in ("pred", "std"))
    slices = [(clean[v][s], mean[v][s], std[v][s]) for v in mean for s in range(mean[v].shape[0])]
    x, mean, std = (np.concatenate([np.ravel(a) for a in arrays]) for arrays in zip(*slices))
    error = np.abs(mean - x)
    edges = np.quantile(x, np.linspace(0, 1, 5))
    group = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, 3)
    return [
        (edges[k], edges[k + 1], *(float(np.mean(error[group == k] <= n * std[group == k])) for n in (1, 2)))
        for k in range(4)
        if np.any(group == k)
    ]


def no_reference(y, x, noise_model):
    """What can be told of the slice x (H,W), denoised from y, without the clean image: see the module."""
    s2 = counted(y, x, noise_model)
    return residual.measure(y, x, s2, np.asarray(noise_model["correlation"]), noise.spectrum(noise_model, *s2.shape))


def correlation_error(path, pred, noise_model, slices=8):
    """How far what a prediction file removed is from being correlated as the noise: the median over some slices."""
    noisy, out = data.read_volumes(path), data.read_matching(pred, path)
    every = [(name, s) for name, volume in out.items() for s in range(volume.shape[0])]
    some = (every[i] for i in data.evenly(len(every), slices))
    return float(np.median([no_reference(noisy[n][s], out[n][s], noise_model)["correlation error"] for n, s in some]))


def noise_at(x, noise_model):
    """Variance of the noise at each pixel of a denoised slice x (H,W)."""
    return noise.variance(noise_model, gaussian_filter(np.asarray(x, np.float64), 1))


def counted(y, x, noise_model):
    """`noise_at`, 0 where y has none (masked), or magnitudes are so dark that their noise is not that of the model."""
    return np.where(noise.bright(noise_model, x) & ~noise.constant(y), noise_at(x, noise_model), 0)


def probe(denoise, y, noise_model, generator, strength=0.1):
    """(slice y, f(y), z, a), each (H,W), of the denoiser f: z is fresh noise, a the derivative of f along it.

    Args: denoise: (B,2k+1,H,W) to (B,1,H,W), tensors. y: (1,2k+1,H,W), the slice with its neighbours. strength: of z.
    """
    x = denoise(y)
    z, a = noise.directional_derivative(noise_model, denoise, y, x, [generator], strength)
    return tuple(v[0, v.shape[1] // 2].numpy() for v in (y, x, z, a))


def estimated_error(y, x, z, a, noise_model):
    """Mean square error of a denoiser on one slice, without the clean image, by `probe`: (of x, of y itself, share).

    Stein's unbiased risk estimate for noise of any covariance, by differences (Ramani et al. 2008), for any denoiser:

        |f(y) - y|^2 - s2 + 2 z a,   with s2 the variance of the noise

    Dark magnitudes, where the noise is another, do not count; share: of the pixels that do.
    """
    joint, counts = any(noise_model.get("through", ())), noise.bright(noise_model, y)
    counts |= not counts.any()
    s2 = noise.local_variance(noise_model, gaussian_filter(y, 1.5) if joint else x, y)
    error = np.square(x - y, dtype=np.float64) - s2 + 2 * z.astype(np.float64) * a
    return error[counts].mean(), s2[counts].mean(), counts.mean()


def estimate(denoise, noisy, noise_model, slices=24, seed=0):
    """{"psnr", "sd": estimated PSNR of a denoiser and its standard error, dB; "noisy": that of the images as they are}.

    noisy: {name: (S,H,W)}, of which `slices` evenly spaced ones are looked at. denoise.context: neighbours it sees.
    The error of the noise model itself comes on top, the same for all denoisers. "uneven": by what share the noise
    differs from place to place (standard deviation of the logarithm of `found_gain`, each block counted by its noise,
    as where there is next to none no model is right, and less where there is texture, some of which passes for noise).
    """
    context, every = getattr(denoise, "context", 0), [(name, s) for name, v in noisy.items() for s in range(v.shape[0])]
    some = [every[i] for i in data.evenly(len(every), slices)]
    stacks = (data.read_around(noisy[name], s, context) for name, s in some)
    return estimate_stacks(denoise, stacks, noise_model, seed)


def estimate_stacks(denoise, stacks, noise_model, seed=0):
    """`estimate` from slices with their neighbours, each (2k+1,H,W)."""
    found, gains, weight = [], [], []
    for k, stack in enumerate(stacks):
        y = torch.from_numpy(np.asarray(stack, np.float32))[None]
        seen = probe(denoise, y, noise_model, runtime.step_rng(seed, k))
        found.append(estimated_error(*seen, noise_model))
        gains.append(np.log(found_gain(noise_model, *(v[None] for v in seen))).ravel())
        power = residual.in_squares(noise.variance(noise_model, seen[1])[None]) + 1e-12
        weight.append((power**2 / (power + residual.texture(seen[1][None]))).ravel())
    mse, s2, _ = np.average(found, 0, weights=np.array(found)[:, 2])  # dark slices have little to say
    spread = np.std(found, 0)[0] / len(found) ** 0.5
    mse, s2 = max(mse, 1e-3 * s2, 1e-12), max(s2, 1e-12)
    gains, weight = map(np.concatenate, (gains, weight))
    uneven = np.average(np.square(gains - np.average(gains, weights=weight)), weights=weight) ** 0.5
    return dict(psnr=-10 * np.log10(mse), sd=4.34 * spread / mse, noisy=-10 * np.log10(s2), uneven=float(uneven))


def found_gain(noise_model, y, x, z, a, apart=None):
    """By what factor the noise is stronger than the model says, (S,H/8,W/8), by `probe` of some slices."""
    return residual.gain(y, x, z, a, noise.variance(noise_model, x), noise_model.get("dark"), apart)


def noise_map(denoise, volume, noise_model, most=12):
    """`found_gain` of every slice of a noisy volume (S,H,W), found in a few rounds: (S,H/8,W/8).

    denoise: as of `probe`; its attribute `context` is k. With neighbours, `most` slices are looked at and the others
    lie between them; without, slices have nothing to do with each other. The map is that to noise of one level: one
    that depends on the intensities, which are divided too, would move with every round.
    """
    context, (count, *shape) = getattr(denoise, "context", 0), volume.shape
    chosen = data.evenly(count, most if context else count)
    apart = (count - 1) / max(len(chosen) - 1, 1) if context else None
    total = np.ones((count, *(-(-n // residual.BLOCK) for n in shape)))
    level = np.mean([noise.variance(noise_model, volume[s]).mean() for s in chosen])
    noise_model = noise_model | dict(variance=[float(level), 0.0, 0.0])

    def look(s):
        around = data.around(s, count, context)
        even = [np.asarray(volume[k]) / data.enlarge(total[k], shape) for k in around]
        y = torch.from_numpy(np.stack(even, dtype=np.float32))[None]
        return [v[None] for v in probe(denoise, y, noise_model, runtime.step_rng(0, s))]

    for k in range(4):  # a denoiser that is told too low a level takes off too little: the next round sees more
        if context:
            found = found_gain(noise_model, *map(np.concatenate, zip(*map(look, chosen))), apart)
        else:
            found = np.concatenate([found_gain(noise_model, *look(s)) for s in chosen])
        if k > 1:  # and more structure: only slices as wholes go on
            found = np.median(found, (1, 2), keepdims=True) * np.ones_like(found)
        total *= interp1d(chosen, found, axis=0)(np.arange(count)) if count > 1 else found
        if k and np.abs(np.log(np.median(found, (1, 2)))).max() < 0.1:
            break
    steady = 0.75 < np.median(found) < 1.33  # else it was no noise that was taken off more and more
    return total if steady else np.ones_like(total)


def wanted(student, law, level=False, signal=False, samples=0):
    """What a run wants of a student beside its images, by a law (lib/apply.py): {name: callable or None}."""
    known = student.noise_model
    return dict(
        noise_map=(lambda volume: noise_map(student.once, volume, known)) if known and known.get("varies") else None,
        samples=(lambda y, x: student.draw(y, x, runtime.step_rng(0), samples)) if samples else None,
        level=(lambda x: np.sqrt(noise_at(x, law))) if level else None,
        signal=(lambda x: posterior.signal(x, noise_at(x, law), law["air"]).astype(np.float32)) if signal else None,
    )


def write_noise_map(args, model, noise_model):
    """Writes `gain` (S,H,W) of every volume: by what factor the noise is stronger there than the model says."""
    noisy = data.read_volumes(args.data, "noisy", args.split)
    denoise = runnable(model, args, (noise_model, noisy))
    with data.write_volumes(args.noise_map_out, "prediction", "evaluate", vars(args), args.data, noise_model) as add:
        maps = [noise_map(denoise, v, noise_model) for v in runtime.progress(noisy.values(), "noise map")]
        typical = np.exp(np.mean([np.log(blocks).mean() for blocks in maps]))  # that is for the model to say
        for (name, volume), blocks in zip(noisy.items(), maps):
            (kept,) = add(name, volume.shape, ["gain"])
            for s, some in enumerate(blocks):
                kept[s] = data.enlarge(some / typical, volume.shape[1:])


def report_tools(noise_model, denoise=None, uneven=False):
    """What lib/report.py says of images, by a noise model and a denoiser, either of which may be None: see there.

    uneven: the denoiser divides images by the map of their noise.
    """
    known = noise_model if noise_model and any(noise_model["variance"]) else None
    names = "measure rank verdict estimate gains residual spectra deviation correlation law"
    tools = dict.fromkeys(names.split()) | dict(context=getattr(denoise, "context", 0))
    if not known:
        return tools
    if denoise:
        one = getattr(denoise, "once", denoise)  # of a mean over symmetries, which takes eight times as long
        tools["estimate"] = lambda stacks: estimate_stacks(one, stacks, known)
        if uneven:
            tools["gains"] = lambda volume: noise_map(one, volume, known, most=6)
    return tools | dict(
        measure=lambda y, x: no_reference(y, x, known),
        rank=residual.rank,
        verdict=residual.said,
        residual=lambda y, x: residual.standardized(y, x, counted(y, x, known)),
        spectra=lambda r, noisy: residual.spectra(r, noisy, noise.spectrum(known, *r.shape)),
        deviation=lambda x: np.sqrt(noise.variance(known, x)),
        correlation=np.asarray(known["correlation"]),
        law=measure.summary(known),
    )


def write_page(args, preds, models, noise_model):
    """Writes --report, the page of the one prediction file, with the estimate of the first student if one is named."""
    (file,), denoise = preds.values(), next(iter(models.values()), None)
    noisy = data.read_volumes(args.data, "noisy", args.split)
    out = data.read_matching(file, args.data, split=args.split)
    tools = report_tools(noise_model, denoise and runnable(denoise, args, (noise_model, noisy), args.ensemble))
    attrs, views = data.read_attrs(args.data)[1], {}
    for name in out:
        mapped = float(attrs[name].get("scale", 1)), float(attrs[name].get("offset", 0))
        volume = formats.Volume(name, noisy[name], str(attrs[name].get("source") or args.data))
        views[name] = report.view(volume, out[name], "dataset", mapped)
    entries = [(report.numbers(one, tools), name, 0) for name, one in views.items()]
    command = report.typed(["evaluate.py", *sys.argv[1:]], [] if args.with_names else sys.argv[1:])
    facts = [("command", command), ("versions", report.versions())]
    report.write(args.report, entries, lambda name, _: views[name], tools, dict(run=facts), names=args.with_names)


def measure_without_reference(noisy, path, file, split, noise_model):
    """The means of `no_reference` over the slices of the prediction `file` of the dataset `path`, and "error".

    noisy: {name: (S,H,W)}. Raises ValueError if no slice has any noise.
    """
    out = data.read_matching(file, path, split=split)
    with data.open_file(file) as h5:
        has_std, stage = "std" in next(iter(h5["volumes"].values())), h5.attrs.get("stage")
    std = data.read_matching(file, path, "std", split=split) if has_std and stage in ("posterior", "distill") else None
    slices, squares = [], []
    for v, volume in out.items():
        for s in range(volume.shape[0]):
            y, x = noisy[v][s], volume[s]
            if not np.ptp(y) or noise.variance(noise_model, x).max() <= 0:
                continue
            slices.append(no_reference(y, x, noise_model))
            if stage == "bsn":
                squares.append(np.square(y - x).mean() - noise.local_variance(noise_model, x, y).mean())
            elif std:
                squares.append(np.square(std[v][s]).mean())
    if not slices:
        raise ValueError(f"no slice of the {split} split of {path} has any noise according to the noise model")
    m = {key: float(np.mean([one[key] for one in slices])) for key in slices[0]}
    return m | (dict(error=float(max(np.mean(squares), 0) ** 0.5)) if squares else {})


def report_without_reference(path, preds, split, noise_model):
    """Prints the table and the verdicts for prediction files made from the dataset `path`; returns {name: measures}."""
    noisy, results = data.read_volumes(path, "noisy", split), {}
    print("| method | removed | correlation error | structure | error | verdict |\n|---|---|---|---|---|---|")
    for name, file in preds.items():
        m = results[name] = measure_without_reference(noisy, path, file, split, noise_model)
        error = f"{m['error']:.4f}" if "error" in m else "-"
        numbers = f"{m['removed']:.2f} | {m['correlation error']:.3f} | {m['structure']:+.2f}"
        print(f"| {name} | {numbers} | {error} | {verdict(m)} |")
    return results


def runnable(text, args, told, ensemble=1):
    """The denoiser (B,2k+1,H,W) to (B,1,H,W) of student.pt, or of bsn.pt+diffusion.pt: the SRDS pair of the two.

    args: device and precision. told, ensemble: of distill.student.
    """
    first, plus, second = text.partition(".pt+")
    if plus and not Path(text).exists():
        options = dict(device=args.device, precision=args.precision)
        return srds.chain(bsn.estimator(f"{first}.pt", **options), srds.sampler(second, **options))
    return distill.student(text, args.device, args.precision, ensemble=ensemble, told=told)


def report_estimates(args, models, noise_model):
    """Prints and returns {name: {"psnr", "sd", "noisy"}} of {name: model}, and of the noisy images themselves."""
    noisy, results = data.read_volumes(args.data, "noisy", args.split), {}
    for name, path in models.items():
        denoise = runnable(path, args, (noise_model, noisy), args.ensemble)
        results[name] = estimate(denoise, noisy, noise_model, args.slices, args.seed)
    uneven, results["noisy"] = results[name]["uneven"], dict(psnr=results[name]["noisy"], sd=0.0)
    print("| method | estimated PSNR, dB |\n|---|---|")
    for name, found in results.items():
        print(f"| {name} | {found['psnr']:.2f} ± {found['sd']:.2f} |")
    print("\nBy Stein's estimate with the noise model; ± is the standard error over slices.")
    print(f"From place to place, the noise differs by {100 * uneven:.0f} % from the model (standard deviation).\n")
    return results


def figure(dataset, preds, split, out):
    """One slice: clean and noisy, then each method; a zoom and the error on one signed scale below. Writes a PNG."""
    clean, noisy = data.read_volumes(dataset, "clean", split), data.read_volumes(dataset, "noisy", split)
    name = next(iter(clean))
    s = clean[name].shape[0] // 2
    x, y = np.asarray(clean[name][s]), np.asarray(noisy[name][s])
    images = {"clean": x, "noisy": y}
    images |= {m: np.asarray(data.read_matching(p, dataset, split=split)[name][s]) for m, p in preds.items()}
    scores = {m: "\n{:.2f} dB / {:.3f}".format(*psnr_ssim(image, x)) for m, image in images.items() if m != "clean"}
    drawn = panels.side_by_side(images, scores, f"{name}, slice {s}; PSNR / SSIM")
    with runtime.atomic_write(out) as temporary:
        drawn.savefig(temporary, format="png")


def parse_predictions(texts):
    """{name: file} of FILE or NAME=FILE; raises ValueError if two have the same name."""
    preds = {}
    for text in texts:
        name, _, path = ("", "", text) if Path(text).exists() else text.partition("=")
        name, path = (name, path) if path else ("", text)
        name = name or Path(path).stem.removesuffix("_out")
        if name in preds or name == "noisy":
            raise ValueError(f"two methods are named {name!r}: write NAME=FILE")
        preds[name] = path
    return preds


def print_calibration(path, preds, split):
    print("\n| method | clean intensity | within 1 std | within 2 std |\n|---|---|---|---|")
    for name, pred in preds.items():
        with data.open_file(pred) as file:
            if file.attrs.get("stage") == "bsn" or "std" not in next(iter(file["volumes"].values())):
                continue  # no uncertainty, or that of y
        for low, high, one, two in calibration(path, pred, split):
            print(f"| {name} | {low:.2f} to {high:.2f} | {one:.3f} | {two:.3f} |")


def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("--data", required=True, help="dataset (.h5) with clean and noisy images")
    files = "prediction files (.h5); a method is named after its file unless NAME is given"
    p.add_argument("--pred", nargs="*", default=[], metavar="[NAME=]FILE", help=files)
    p.add_argument("--split", choices=(*data.SPLITS, "all"), default="test", help="slices to evaluate (default test)")
    p.add_argument("--calibration", action="store_true", help="how well `std` of the predictions tells their error")
    p.add_argument("--no-reference", action="store_true", help="what can be told without clean images")
    run = "with --no-reference: student.pt, or bsn.pt+diffusion.pt, to run, for their estimated PSNR; one of arch told "
    run += "is told --noise anew: give the file that it was trained with"
    p.add_argument("--model", nargs="*", default=[], metavar="[NAME=]FILE", help=run)
    p.add_argument("--ensemble", type=int, choices=(1, 8), default=1, help="of these students (default 1)")
    p.add_argument("--slices", type=runtime.positive, default=24, help="to estimate their PSNR from (default 24)")
    p.add_argument("--report", metavar="FILE", help="with --no-reference and one --pred: a page with pictures (.html)")
    p.add_argument("--with-names", action="store_true", help="name files and folders on that page")
    p.add_argument("--noise", default="measured", help=f"with --no-reference: {measure.NOISE_HELP}")
    p.add_argument("--noise-map-out", metavar="FILE", help="by what factor the noise differs from place to place (.h5)")
    p.add_argument("--json", help="write the table as JSON")
    p.add_argument("--figure", help="write a figure of the middle slice (.png)")
    args = p.parse_args(argv)
    preds, students = parse_predictions(args.pred), parse_predictions(args.model)
    inputs = [args.data, *preds.values(), *(part for text in students.values() for part in (text, *text.split("+")))]
    outputs = [f for f in (args.json, args.figure, args.noise_map_out, args.report) if f]
    runtime.check_outputs([*inputs, args.noise], outputs)
    if students and not args.no_reference:
        raise ValueError("--model is for --no-reference: for tables, give prediction files (--pred)")
    if args.report and not (args.no_reference and len(preds) == 1):
        raise ValueError(f"--report is for --no-reference and one file of --pred, not {len(preds)}")
    if args.no_reference:
        if not students and (args.noise_map_out or not preds):
            raise ValueError("--noise-map-out needs --model" if preds else "--no-reference needs --pred or --model")
        noise_model, results = measure.load_noise_model(args.noise, args.data), {}
        if students:
            results |= report_estimates(args, students, noise_model)
        if args.noise_map_out:
            write_noise_map(args, list(students.values())[-1], noise_model)
        if preds:
            results |= report_without_reference(args.data, preds, args.split, noise_model)
        if args.report:
            write_page(args, preds, students, noise_model)
        return write_json(results, args.json)
    methods = {"noisy": score(args.data, None, args.split)}
    methods |= {name: score(args.data, path, args.split) for name, path in preds.items()}
    print(markdown(methods))
    if args.figure:
        figure(args.data, preds, args.split, args.figure)
    results = {name: summary(slices) for name, slices in methods.items()}
    for (a, b), p in comparisons(methods).items():
        results[a].setdefault("p", {})[b] = results[b].setdefault("p", {})[a] = p
    write_json(results, args.json)
    if args.calibration:
        print_calibration(args.data, preds, args.split)


def write_json(results, path):
    """Writes the results, if a file was named."""
    if path:
        with runtime.atomic_write(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    runtime.command(main)
