"""How well Stein's estimate tells the error of a denoiser, and which of two denoisers is the better one.

    Out   FILE.md    a table; FILE.json: every case

    python -m experiments.stein --out results/stein.md FOLDER/head-gaussian-6_255 FOLDER/t2w-poisson-200 ...

FOLDERs are cells of experiments.volumes, with their students (.pt). Each denoises every second slice of the test block;
its mean square error there is estimated with the noise told, and known. A case is two students on a block of
--block slices whose PSNRs differ by 0.05 dB or more: does the estimate name the better one?
"""

import itertools
from pathlib import Path

import numpy as np
import torch

import data
import distill
import evaluate
import noise
from lib import runtime

STUDENTS = ("instant", "tuned", "tuned_told", "scratch0", "scratch1", "scratch2", "scratch3")


def noise_of(folder):
    """The noise that a cell's name tells: head-gaussian-6_255-1.2 is gaussian:6/255:1.2."""
    return noise.parse_noise_model(":".join(Path(folder).name.split("-")[1:]).replace("_", "/"))


def errors(folder, model, noise_model):
    """(true, estimated) mean square errors of a student on every second test slice, each (n,)."""
    noisy, clean = (data.read_volumes(folder / "noisy.h5", key, "test") for key in ("noisy", "clean"))
    denoise, found = distill.student(model, told=(noise_model, noisy)), []
    for k, (name, s) in enumerate([(v, s) for v in noisy for s in range(0, len(noisy[v]), 2)]):
        y = torch.from_numpy(np.asarray(data.read_around(noisy[name], s, denoise.context), np.float32))[None]
        seen = evaluate.probe(denoise, y, noise_model, runtime.step_rng(0, k))
        estimated = evaluate.estimated_error(*seen, noise_model)[0]
        found.append((np.square(denoise(y)[0, 0].numpy() - clean[name][s]).mean(dtype=np.float64), estimated))
    return np.array(found).T


def decibels(mse):
    return -10 * np.log10(np.maximum(mse, 1e-12))


def cases(students, block):
    """[(difference of PSNR, estimated difference)] of all pairs of {name: (true, estimated)} on blocks of slices."""
    out = []
    for one, other in itertools.combinations(students.values(), 2):
        for first in range(0, one.shape[1] - block + 1, block):
            mine, its = (decibels(v[:, first : first + block].mean(1)) for v in (one, other))
            out.append(tuple(mine - its))
    return out


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="cells of experiments.volumes")
    p.add_argument("--block", type=runtime.positive, default=3, help="slices of a case (default 3)")
    p.add_argument("--out", required=True, help="table to write (.md)")
    args = p.parse_args(argv)
    lines, found = ["| cell | student | true, dB | estimated | off |", "|---|---|---|---|---|"], {}
    for folder in map(Path, args.folders):
        models = {name: folder / f"{name}.pt" for name in STUDENTS if (folder / f"{name}.pt").exists()}
        students = {name: errors(folder, path, noise_of(folder)) for name, path in models.items()}
        for name, both in students.items():
            true, estimated = decibels(both.mean(1))
            lines.append(f"| {folder.name} | {name} | {true:.2f} | {estimated:.2f} | {estimated - true:+.2f} |")
        found[folder.name] = cases(students, args.block)
    every = np.array(list(itertools.chain.from_iterable(found.values()))).reshape(-1, 2)
    lines += ["", "| PSNRs differ by, dB | cases | the better one is named |", "|---|---|---|"]
    for low, high in ((0.05, 0.1), (0.1, 0.2), (0.2, 0.5), (0.5, np.inf)):
        some = every[(np.abs(every[:, 0]) >= low) & (np.abs(every[:, 0]) < high)]
        right = 100 * np.mean(some[:, 0] * some[:, 1] > 0) if len(some) else float("nan")
        lines.append(f"| {low} to {high} | {len(some)} | {right:.0f} % |")
    with runtime.atomic_write(args.out) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    evaluate.write_json(found, Path(args.out).with_suffix(".json"))
    print("\n".join(lines))


if __name__ == "__main__":
    runtime.command(main)
