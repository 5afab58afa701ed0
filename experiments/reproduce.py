"""The tables of the paper, at its scale or at one for two processor cores: every rival, both recipes, the same images.

    In    --data FOLDER...        the image sets; reproduce_data.py says how they are named and split
    Out   OUT/<image set>-<noise>[-<correlation>]-s<seed>.json  a cell: PSNR, SSIM, leak, seconds, flags of each method
          OUT/tables.md, figure3.png, figure4.png               of all cells that are there (reproduce_report.py)

    python -m experiments.reproduce --data sets/ --out results/reproduce       # scale small: 5 hours of one core
    python -m experiments.reproduce --table 1 --scale paper --data /data --out results/paper         # a GPU, days
    python -m experiments.reproduce --table m4raw --data sets/ --out results/m4raw   # as Corruption2Self has M4Raw
    python -m experiments.reproduce --table none --out results/reproduce       # only writes the tables again

Methods that OUT has already are not run again, and an interrupted run goes on where it stopped; --work keeps the image
sets and all intermediate files. The same command may run several times at once: each takes cells that no other has. On
a processor, start one for each core with OMP_NUM_THREADS=1.

Budgets. `--scale small`: every learned method trains for the same time, --budget seconds of one processor core (75).
The number of steps follows from the milliseconds that a step of each network takes (COST). The paper's recipe has the
budget three times, once for each of its networks, of which the first is the blind-spot network of the tables: with a
third for each, its diffusion model would stop short of where it begins to pay (results/curves). Ours from scratch has
a third for its blind-spot network and the rest for the student; a further round has two thirds again. Supervised
training, Noise2Self, Neighbor2Neighbor and both students have the same network. `--scale paper`: the preset `paper` of
every stage. At both scales a network sees one slice at a time, and a student is applied once: `--context 0 --ensemble
1`, as in the paper.

Methods:

    nlm                          non-local means, with the noise level that measure.py finds; needs no training
    nlm-calibrated tv wavelet    strength by J-invariance; need no training
    bm3d bm4d                    told the true noise; run where their packages are (experiments/requirements.txt)
    supervised                   distill.py --target clean
    noise2self nei2nei           baselines.py
    lgbpn puca                   bsn.py; they are told the blind spot: 1, 5 or 9 (Sec. 4.2)
    paper, paper-2, paper-3      the paper's recipe, from one of these; a round starts from what the last one denoised
    posterior                    the same blind-spot network, then posterior.py, noise measured
    ours, ours-2, ours-3         recorruption, blind spot and noise measured: denoise.py --recipe scratch
    default                      denoise.py as it comes: the shipped network, tuned, noise measured; with neighbouring
                                 slices and the mean over the symmetries, which no other method here has
    single srds kd-single        one sample, the SRDS mean, the student of one sample (that of the mean is `paper`)
    single25 srds25              the first two with 25 steps
"""

import argparse
import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import bsn
import data
import denoise
import diffusion
import distill
import evaluate
import noise
import posterior
from experiments import baselines, classical, reproduce_data, reproduce_report
from lib import runtime
from lib.stages import Stages

# Milliseconds of one core for a training step of preset `fast`; blind-spot networks: by the diameter of the hole.
COST = {
    "puca": {1: 57, 5: 64, 9: 85}, "lgbpn": {1: 155, 5: 155, 9: 155}, "diffusion": 104,
    "student": 24, "recorrupted": 43, "noise2self": 22, "nei2nei": 29, "default": 46,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# the methods of a cell
# ---------------------------------------------------------------------------------------------------------------
class Cell(Stages):
    """One noisy dataset and every method on it.

    Each method sets `shares` {module: share of the budget} and `cost` {module: key of COST}; `used` lists the outputs
    that it stands on, whether they were made for it or were there already.
    """

    def __init__(self, args, cell, folder):
        self.dataset, self.kind, self.correlation, seed = cell
        self.scale, self.budget, self.used = args.scale, args.budget, []
        self.clean = str(folder.parent / f"{self.dataset}.h5")
        self.images = data.fingerprints(self.clean)
        digest = [args.scale, args.budget, args.device, args.precision, self.images]
        args = argparse.Namespace(**{**vars(args), "seed": seed})
        super().__init__(folder, str(folder / "noisy.h5") if self.kind else self.clean, args, digest)
        self.sampling = ["--steps", 3] if self.scale == "small" else []

    def once(self, action, argv, out, command, model=None):
        self.used.append(out)
        return super().once(action, argv, out, command, model)

    def training_flags(self, module):
        """Flags for as much training as the method's share of the budget allows."""
        name, size = self.cost[module], "paper" if self.scale == "paper" else "fast"
        presets = {"lgbpn": bsn.LGBPN_PRESETS, **baselines.PRESETS}.get(name, module.PRESETS)
        flags = ["--preset", size, "--crop", min(presets[size]["crop"], self.smallest_side()), *self.common]
        flags += [] if module is baselines else ["--context", 0]
        flags += ["--ensemble", 1] if module is distill else []
        if size == "paper":
            return flags
        cost = COST[name][self.spot] if module is bsn else COST[name]
        return ["--steps", max(1, round(1000 * self.budget * self.shares[module] / cost)), *flags]

    def make_noisy(self):
        """Makes the noisy images, the same for all seeds of the training, and measures their noise."""
        if self.kind:
            level = reproduce_data.LEVELS[self.dataset][self.kind]
            flags = ["--data", self.clean, "--kind", self.kind, "--level", level, "--correlation", self.correlation]
            self.run(noise, "add", *flags, out="noisy.h5")
        self.measured_spot = denoise.measure_noise(self, "noise_first.json")["blind_spot"]
        self.spot = {0: 1, 0.5: 5, 1.2: 9}[self.correlation] if self.kind else self.measured_spot  # Sec. 4.2

    def train_blind_spot(self, arch, name, *flags):
        self.cost[bsn] = arch
        flags = ["--arch", arch, "--blind-spot", self.spot, *flags]
        return self.train(bsn, *flags, out=f"{name}_out.h5", model=f"{name}.pt")

    def conditioning(self):
        """The blind-spot network that recipes start from: PUCA; at the paper's scale LG-BPN for correlated noise."""
        return "lgbpn" if self.scale == "paper" and self.correlation else "puca"

    def make(self, method):
        """Runs a method; returns the name of its prediction file."""
        self.shares = {bsn: 1, diffusion: 1, distill: 1}
        self.cost = {bsn: "puca", diffusion: "diffusion", distill: "student"}
        self.make_noisy()
        asks = method in ("nlm", "default") or method.startswith("ours") or not self.kind  # for the measured noise
        self.used = [self.noise_file] if asks else []
        if method in (*baselines.CLASSICAL, *baselines.PRESETS, *bsn.NETWORKS, *classical.METHODS, "supervised"):
            return self.make_rival(method)
        if method == "default":
            steps = 1000 * self.budget / COST["default"] if self.scale == "small" else denoise.TUNING_STEPS
            self.args.effort, as_they_came = steps / denoise.TUNING_STEPS, self.data
            kept = denoise.tuned_recipe(self)[0]
            self.data = as_they_came  # the recipe may have gone on with images divided by the noise map
            shutil.copyfile(self.path(kept), self.path("default_out.h5"))
            return "default_out.h5"
        recipe, _, rounds = method.partition("-")
        if recipe == "ours":  # it measures its blind spot; all others are told (Sec. 4.2)
            self.spot, self.cost[distill] = self.measured_spot, "recorrupted"
            self.shares |= {bsn: 1 / 3, distill: 2 / 3}
            estimate = self.train_blind_spot(self.conditioning(), "ours_bsn")
            return denoise.recorrupted_recipe(self, estimate, int(rounds or 1))[0]
        estimate = self.train_blind_spot(self.conditioning(), "bsn")
        if method == "posterior":
            denoise.measure_noise(self, "noise_bsn.json", "--pred", self.path(estimate))
            flags = ["--pred", self.path(estimate), "--noise", self.path(self.noise_file)]
            return self.run(posterior, *self.data, *flags, out="posterior_bsn_out.h5")
        if recipe == "paper":
            return denoise.paper_recipe(self, estimate, int(rounds or 1))[0]
        return self.make_ablation(method, estimate)

    def make_rival(self, method):
        """Runs a method that stands for itself."""
        out, test = f"{method}_out.h5", ["--split", "test"]
        if method in baselines.CLASSICAL:
            known = ["--noise", self.path(self.noise_file)] if method == "nlm" else []
            return self.run(baselines, *self.data, "--method", method, *known, *test, out=out)
        if method in classical.METHODS:
            told = f"{self.kind}:{reproduce_data.LEVELS[self.dataset][self.kind]}:{self.correlation}"
            return self.run(classical, *self.data, "--method", method, "--noise", told, *test, out=out)
        if method in baselines.PRESETS:
            self.shares, self.cost = {baselines: 1}, {baselines: method}
            return self.train(baselines, "--method", method, *test, out=out, model=f"{method}.pt")
        if method in bsn.NETWORKS:
            return self.train_blind_spot(method, *(["bsn"] if method == self.conditioning() else [method, *test]))
        return self.train(distill, "--target", "clean", *test, out=out, model=f"{method}.pt")

    def make_ablation(self, method, estimate):
        """Runs the paper's recipe without SRDS, or without the student (Table 5)."""
        name = method.removeprefix("kd-")
        flags = [] if name == "srds" else ["--mode", "pair" if name == "srds25" else "single"]
        flags += ["--steps", 25, "--split", "test"] if name.endswith("25") else []
        checkpoint = denoise.conditional_model(self, estimate)
        sampled = denoise.sample(self, estimate, checkpoint, f"{name}_out.h5", *flags)
        if name == method:
            return sampled
        return self.train(distill, "--target", self.path(sampled), out=f"{method}_out.h5", model=f"{method}.pt")

    def scored(self, method):
        """Runs a method; returns its scores, seconds and flags, a plain dict."""
        out = self.make(method)
        slices = evaluate.score(self.data[1], self.path(out), "test")
        stages = {name: self.done[name] for name in self.used}
        cost = {k: round(sum(stage[k] for stage in stages.values()), 1) for k in ("seconds", "processor_seconds")}
        flags = {k: " ".join(stage["argv"]).replace(f"{self.folder.parent}/", "") for k, stage in stages.items()}
        return dict(**plain(slices), commit=commit(), **cost, stages=flags)


def plain(slices):
    """The scores of evaluate.score for JSON: their means, and PSNR and SSIM of each slice."""
    means = {k: round(float(v), 5) for k, v in evaluate.summary(slices).items()}
    return {**means, "slices": {k: [round(float(x), 5) for x in slices[k]] for k in ("psnr", "ssim")}}


def commit():
    """The commit of the project's folder, marked if files have changed since; "" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------------------
# cells, one after the other
# ---------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def alone(path, wait=True):
    """Yields whether no other process holds the lock `path`, after waiting for it if asked; holds it for the block."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except BlockingIOError:
            free = False
        yield free


def read_cell(path, args, cell, images):
    """What the JSON of a cell holds, a new one if there is none. Raises ValueError if it is from another study."""
    dataset, kind, correlation, seed = cell
    head = dict(dataset=dataset, noise=dict(kind=kind, correlation=correlation), seed=seed, scale=args.scale)
    head |= dict(budget=args.budget if args.scale == "small" else None, images=images)
    found = json.loads(path.read_text()) if path.exists() else {**head, "methods": {}}
    for key in ("scale", "budget", "images"):
        if found[key] != head[key]:
            what = "other images" if key == "images" else f"{key} {found[key]}, not {head[key]}"
            raise ValueError(f"{path} is of {what}: give another --out")
    return found


def run_cell(args, cell, methods):
    """Runs the methods that a cell's JSON lacks, and adds them to it one by one. Returns those that failed."""
    name = reproduce_data.name_of(*cell)
    path, folder, failed = Path(args.out) / f"{name}.json", Path(args.work) / name, []
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "lock", wait=False) as free:
        if not free:
            print(f"{name}: another process has it", flush=True)
            return failed
        stages = Cell(args, cell, folder)
        found = read_cell(path, args, cell, stages.images)
        for method in [method for method in methods if method not in found["methods"] and can_run(method, cell)]:
            print(f"{name}: {method}", flush=True)
            try:
                if "noisy" not in found["methods"]:
                    stages.make("nlm")
                    found["methods"]["noisy"] = plain(evaluate.score(stages.data[1], None, "test"))
                found["methods"][method] = stages.scored(method)
                evaluate.write_json(found, path)
            except ValueError as error:  # such as a loss that became NaN: the other methods go on
                print(f"reproduce.py: {name}: {method} failed: {error}", file=sys.stderr, flush=True)
                failed.append(method)
    return failed


def can_run(method, cell):
    """Whether a method that is told the noise has a package here, a noise to be told and, BM4D, volumes."""
    if method not in classical.METHODS:
        return True
    dataset, kind, *_ = cell
    try:
        classical.load(method)
    except ValueError:
        return False
    return bool(kind) and (method != "bm4d" or dataset not in reproduce_data.FLAT)


def wanted_cells(args, sets):
    """{cell: all its methods}: a cell may stand in several tables. Raises ValueError if there is none."""
    tables = [int(t) if t.isdigit() else t for t in args.table if t not in ("none", "all")]
    tables = [*range(1, 6), *(t for t in tables if t == "m4raw")] if "all" in args.table else tables
    wanted = {}
    for table in tables:
        found = [cell for cell in reproduce_data.cells(table, args.scale, sets, args.seeds) if cell[0] in sets]
        if not found:
            print(f"reproduce: table {table} left out: its images are in none of the folders of --data", flush=True)
        for cell in found:
            wanted[cell] = list(dict.fromkeys([*wanted.get(cell, []), *reproduce_data.METHODS[table]]))
    if tables and not wanted:
        nothing = f"no image set of scale {args.scale} (reproduce_data.py names them)"
        raise ValueError(f"--data {' '.join(args.data)}: {nothing}")
    return wanted


def main(argv=None):
    p = runtime.parser(__doc__)
    tables = ["1", "2", "3", "4", "5", "all", "m4raw", "none"]
    p.add_argument("--table", nargs="+", choices=tables, default=["all"], help="default all: the five of the paper")
    p.add_argument("--scale", choices=("small", "paper"), default="small", help="see above (default small)")
    p.add_argument("--seeds", type=runtime.positive, default=1, help="of the training (default 1; Table 5: 2)")
    p.add_argument("--data", nargs="*", default=[], metavar="FOLDER", help="where the image sets are")
    p.add_argument("--out", default="reproduced", help="folder of the results (default reproduced)")
    p.add_argument("--work", default="reproduction", help="folder of intermediate files (default reproduction)")
    p.add_argument("--budget", type=float, default=75, help="small: seconds of training of each method (default 75)")
    p.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), or a torch device (default auto)")
    p.add_argument("--precision", choices=("auto", "float32"), default="auto", help="as for every stage (default auto)")
    args = p.parse_args(argv)
    if not args.budget > 0:
        raise ValueError(f"--budget {args.budget:g} is not positive")
    sets, work = reproduce_data.available(args.scale, args.data), Path(args.work)
    wanted = wanted_cells(args, sets)
    for folder in (Path(args.out), work):
        folder.mkdir(parents=True, exist_ok=True)
    for dataset in dict.fromkeys(cell[0] for cell in wanted):
        with alone(work / f"{dataset}.lock"):
            if not (work / f"{dataset}.h5").exists():
                reproduce_data.make(dataset, sets[dataset], work / f"{dataset}.h5", work)
    failed = [run_cell(args, cell, methods) for cell, methods in wanted.items()]
    with alone(work / "report.lock"):
        reproduce_report.write(args.out, args.work)
    return 1 if any(failed) else 0


if __name__ == "__main__":
    runtime.command(main)
