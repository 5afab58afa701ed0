"""The tables of the paper, at its scale or at one for two processor cores: every rival, both recipes, the same images.

    In    --data FOLDER...        the image sets; reproduce_data.py says how they are named and split
    Out   OUT/<dataset>-<kind>[-<correlation>]-s<seed>.json    a cell: PSNR, SSIM, leak, seconds, flags of each method
          OUT/tables.md, figure3.png, figure4.png              of all cells that are there (reproduce_report.py)

    python reproduce.py --table all --scale small --data sets/ --out results/reproduce    # 2 hours on one core
    python reproduce.py --table 1 --scale paper --data /data --out results/paper          # a GPU, days

What OUT holds is not made again, and an interrupted run goes on where it was; --work keeps the image sets and the files
in between. The same command may run several times at once: each takes cells that no other has. On a processor, start
one for each core with OMP_NUM_THREADS=1.

Budgets. `--scale small`: every learned method trains for the same time, --budget seconds of one processor core (75) by
the milliseconds a step of each network takes (COST), whatever it consists of: a blind-spot network has all of it, the
paper's recipe a third for each of its three networks, ours a third for the blind-spot network and the rest for the
student; a further round has two thirds again. Supervised training, Noise2Self, Neighbor2Neighbor and both students have
the same network. `--scale paper`: the preset `paper` of every program.

Methods:

    nlm                          non-local means of the level that noise.py measures; needs no training
    nlm-calibrated tv wavelet    strength by J-invariance; needs no training
    supervised                   distill.py --target clean
    noise2self nei2nei           baselines.py
    lgbpn puca                   bsn.py; they are told the blind spot: 1, 5 or 9 (Sec. 4.2)
    paper, paper-2, paper-3      the paper's recipe, told the same; a round starts from what the last one denoised
    ours, ours-2, ours-3         recorruption, blind spot and noise measured: denoise.py --recipe recorrupted
    single srds kd-single        one sample, the SRDS mean, the student of one sample (that of the mean is `paper`)
    single25 srds25              the first two with 25 steps
"""

import argparse
import contextlib
import fcntl
import json
import subprocess
import sys
from pathlib import Path

import baselines
import bsn
import data
import denoise
import diffusion
import distill
import evaluate
import noise
import reproduce_data
import runtime

# Milliseconds of one core for a training step of preset `fast`; blind-spot networks: by the diameter of the hole.
COST = {
    "puca": {1: 55, 5: 65, 9: 85},
    "lgbpn": {1: 166, 5: 166, 9: 166},
    "diffusion": 147,
    "student": 29,
    "recorrupted": 47,
    "noise2self": 28,
    "nei2nei": 30,
}
RIVALS = ["supervised", "nlm", "lgbpn", "puca", "nei2nei", "paper", "ours"]
METHODS = {
    1: [*RIVALS[:2], "nlm-calibrated", "tv", "wavelet", "noise2self", *RIVALS[2:]],
    2: RIVALS,
    3: RIVALS,
    4: ["paper", "paper-2", "paper-3", "ours", "ours-2", "ours-3"],
    5: ["nlm", "single", "srds", "kd-single", "paper", "single25", "srds25"],
}
CORRELATIONS = (0.5, 1.2)


def cells(table, scale, sets):
    """[(dataset, kind, correlation, seed)] of a table; kind None: the images have noise of their own."""
    synthetic = [name for name in sets if not name.startswith("m4raw")]
    if table == 3:
        return [(name, None, 0, 0) for name in sets if name.startswith("m4raw")]
    if not synthetic:
        return []
    first = "knee" if scale == "paper" else synthetic[0]
    if table == 1:
        kinds = noise.KINDS[:2]
        return [(name, kind, 0, 0) for name in synthetic for kind in kinds]
    if table == 2:
        return [(first, kind, correlation, 0) for kind in noise.KINDS for correlation in CORRELATIONS]
    correlations = (0, 1.2) if (table, scale) == (4, "small") else (0, *CORRELATIONS)
    return [(first, "gaussian", correlation, seed) for seed in range(1 + (table == 5)) for correlation in correlations]


def name_of(dataset, kind, correlation, seed):
    """Of a cell's files."""
    return "-".join([dataset, *([kind] if kind else []), *([f"{correlation:g}"] if correlation else []), f"s{seed}"])


class Cell(denoise.Recipe):
    """One noisy dataset and every method on it. `shares` of the budget: {module: share}, set by each method."""

    def __init__(self, args, cell, folder):
        self.dataset, self.kind, self.correlation, seed = cell
        self.scale, self.seconds, self.used = args.scale, args.budget, []
        self.clean = str(folder.parent / f"{self.dataset}.h5")
        self.images = data.fingerprints(self.clean)
        mark = [args.scale, args.budget, args.device, args.precision, self.images]
        args = argparse.Namespace(**{**vars(args), "seed": seed})
        super().__init__(args, folder, str(folder / "noisy.h5") if self.kind else self.clean, mark)
        self.pipeline, self.stage = self.stage, self.use
        self.sampling = ["--steps", 3] if self.scale == "small" else []

    def use(self, main, out, *flags, trains=None):
        self.used.append(out)
        self.pipeline(main, out, *flags, trains=trains)

    def steps(self, module):
        """Flags for as much training as the method's share of the budget allows."""
        presets = module.PRESETS
        if module in (bsn, baselines):
            presets = bsn.LGBPN_PRESETS if self.cost[module] == "lgbpn" else presets.get(self.cost[module], presets)
        size = "paper" if self.scale == "paper" else "fast"
        flags = ["--preset", size, "--crop", min(presets[size]["crop"], self.smallest()), *self.common]
        if size == "paper":
            return flags
        cost = COST[self.cost[module]][self.spot] if module is bsn else COST[self.cost[module]]
        return ["--steps", max(1, round(1000 * self.seconds * self.shares[module] / cost)), *flags]

    def noisy(self):
        """Makes the noisy images, once for all seeds of the training, and measures the noise."""
        if self.kind:
            level = reproduce_data.LEVELS[self.dataset][self.kind]
            flags = ["--data", self.clean, "--kind", self.kind, "--level", level, "--correlation", self.correlation]
            self.stage(noise.main, "noisy.h5", "add", *flags)
        self.model_of_noise = "noise_first.json"
        self.stage(noise.main, self.model_of_noise, "measure", *self.data)
        self.measured_spot = json.loads((self.folder / self.model_of_noise).read_text())["blind_spot"]
        self.spot = {0: 1, 0.5: 5, 1.2: 9}[self.correlation] if self.kind else self.measured_spot  # Sec. 4.2

    def blind_spot(self, arch, out, model, *flags):
        self.cost[bsn] = arch
        return self.train(bsn, out, model, "--arch", arch, "--blind-spot", self.spot, *flags)

    def blind_spot_network(self, ours=False):
        """The recipes' condition: at the paper's scale PUCA for white and LG-BPN for correlated noise (Sec. 4.2).

        Ours has the blind spot that was measured; all others are told.
        """
        arch, told = "lgbpn" if self.scale == "paper" and self.correlation else "puca", self.spot
        if ours:
            self.spot = self.measured_spot
        name = "bsn" if self.spot == told else "bsn_measured"
        return self.blind_spot(arch, f"{name}_out.h5", f"{name}.pt")

    def make(self, method):
        """Runs a method; returns the name of its prediction file."""
        self.used, self.pipeline.changed = [], False
        self.shares = {bsn: 1 / 3, diffusion: 1 / 3, distill: 1 / 3}
        self.cost = {bsn: "puca", diffusion: "diffusion", distill: "student"}
        self.noisy()
        asks = method == "nlm" or method.startswith("ours") or not self.kind
        self.used = [self.model_of_noise] if asks else []  # whether it stands on the measured noise
        if method == "nlm":
            known = ["--noise", self.path(self.model_of_noise)]
            self.stage(baselines.main, "nlm_out.h5", *self.data, *known, "--split", "test")
            return "nlm_out.h5"
        if method in baselines.CLASSICAL:
            self.stage(baselines.main, f"{method}_out.h5", *self.data, "--method", method, "--split", "test")
            return f"{method}_out.h5"
        if method in baselines.PRESETS:
            self.shares, self.cost = {baselines: 1}, {baselines: method}
            return self.train(baselines, f"{method}_out.h5", f"{method}.pt", "--method", method, "--split", "test")
        if method in bsn.NETWORKS:
            self.shares[bsn] = 1
            return self.blind_spot(method, f"{method}_out.h5", f"{method}.pt", "--split", "test")
        if method == "supervised":
            self.shares[distill] = 1
            flags = ["--target", "clean", "--split", "test"]
            return self.train(distill, "supervised_out.h5", "supervised.pt", *flags)
        kind, _, rounds = method.partition("-")
        estimate = self.blind_spot_network(kind == "ours")
        if kind == "ours":
            self.shares[distill], self.cost[distill] = 2 / 3, "recorrupted"
            return self.recorrupted(estimate, int(rounds or 1))[0]
        if kind == "paper":
            return self.paper(estimate, int(rounds or 1))[0]
        model = self.diffusion(estimate)
        if method == "srds":
            return self.sample(estimate, model, "srds_out.h5")
        if method in ("single25", "srds25"):
            mode = "single" if method == "single25" else "pair"
            return self.sample(estimate, model, f"{method}_out.h5", "--steps", 25, "--mode", mode, "--split", "test")
        single = self.sample(estimate, model, "single_out.h5", "--mode", "single")
        if method == "single":
            return single
        return self.train(distill, "kd-single_out.h5", "kd-single.pt", "--target", self.path(single))

    def measured(self, method):
        """Runs a method and measures it; a plain dict."""
        out = self.make(method)
        slices = evaluate.measure(self.data[1], self.path(out), "test")
        stages = {name: self.pipeline.done[name] for name in self.used}
        return dict(
            **plain(slices),
            commit=commit(),
            seconds=round(sum(stage["seconds"] for stage in stages.values()), 1),
            processor_seconds=round(sum(stage["processor_seconds"] for stage in stages.values()), 1),
            stages={
                name: " ".join(stage["argv"]).replace(f"{self.folder.parent}/", "") for name, stage in stages.items()
            },
        )


def plain(slices):
    """Measures of evaluate.measure for JSON: their means, and PSNR and SSIM of each slice."""
    means = {k: round(float(v), 5) for k, v in evaluate.summary(slices).items()}
    return {**means, "slices": {k: [round(float(x), 5) for x in slices[k]] for k in ("psnr", "ssim")}}


def commit():
    """Of the working copy, marked when it has changes; "" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


@contextlib.contextmanager
def alone(path, wait=True):
    """Yields whether this process alone holds the lock `path`, waiting for it if asked; it ends with the process."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def started(path, args, cell, images):
    """What the JSON of a cell holds; a new one if there is none. Raises ValueError if it is of another study."""
    dataset, kind, correlation, seed = cell
    head = dict(dataset=dataset, noise=dict(kind=kind, correlation=correlation), seed=seed, scale=args.scale)
    head |= dict(budget=args.budget if args.scale == "small" else None, images=images)
    known = json.loads(path.read_text()) if path.exists() else {**head, "methods": {}}
    for key in ("scale", "budget", "images"):
        if known[key] != head[key]:
            what = "other images" if key == "images" else f"{key} {known[key]}, not {head[key]}"
            raise ValueError(f"{path} is of {what}: give another --out")
    return known


def run(args, cell, methods):
    """Fills in what a cell's JSON lacks, method by method. Returns the methods that failed."""
    name = name_of(*cell)
    path, folder, failed = Path(args.out) / f"{name}.json", Path(args.work) / name, []
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "lock", wait=False) as mine:
        if not mine:
            print(f"{name}: another process has it", flush=True)
            return failed
        one = Cell(args, cell, folder)
        known = started(path, args, cell, one.images)
        for method in methods:
            if method in known["methods"]:
                continue
            print(f"{name}: {method}", flush=True)
            try:
                if "noisy" not in known["methods"]:
                    one.make("nlm")
                    known["methods"]["noisy"] = plain(evaluate.measure(one.data[1], None, "test"))
                known["methods"][method] = one.measured(method)
            except ValueError as error:  # such as a loss that became NaN: the other methods go on
                print(f"reproduce.py: {name}: {method} failed: {error}", file=sys.stderr, flush=True)
                failed.append(method)
                continue
            with runtime.whole(path) as temporary:
                temporary.write_text(json.dumps(known, indent=1) + "\n")
    return failed


def main(argv=None):
    import reproduce_report  # it stands on this file

    p = runtime.parser(__doc__)
    p.add_argument("--table", nargs="+", choices=["1", "2", "3", "4", "5", "all", "none"], default=["all"])
    p.add_argument("--scale", choices=("small", "paper"), default="small")
    p.add_argument("--data", nargs="*", default=[], metavar="FOLDER", help="where the image sets lie")
    p.add_argument("--out", default="reproduced", help="folder of the results (default reproduced)")
    p.add_argument("--work", default="reproduction", help="folder of everything in between (default reproduction)")
    p.add_argument("--budget", type=float, default=75, help="small: seconds of training of each method (default 75)")
    p.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), or a torch device (default auto)")
    p.add_argument("--precision", choices=("auto", "float32"), default="auto", help="as of every program")
    args = p.parse_args(argv)
    if not args.budget > 0:
        raise ValueError(f"--budget {args.budget:g} is not positive")
    tables = range(1, 6) if "all" in args.table else [int(t) for t in args.table if t != "none"]
    sets, failed = reproduce_data.available(args.scale, args.data), 0
    wanted = {}  # a cell stands in several tables: all its methods at once
    for table in tables:
        found = [cell for cell in cells(table, args.scale, sets) if cell[0] in sets]
        if not found:
            print(f"reproduce: table {table} left out: its images are in none of the folders of --data", flush=True)
        for cell in found:
            wanted.setdefault(cell, []).extend(m for m in METHODS[table] if m not in wanted.get(cell, []))
    if tables and not wanted:
        raise ValueError(
            f"--data {' '.join(args.data)}: no image set of scale {args.scale} (reproduce_data.py names them)"
        )
    for folder in (args.out, args.work):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for dataset in dict.fromkeys(cell[0] for cell in wanted):
        out = Path(args.work) / f"{dataset}.h5"
        with alone(Path(args.work) / f"{dataset}.lock"):
            if not out.exists():
                reproduce_data.make(dataset, sets[dataset], out, Path(args.work))
    for cell, methods in wanted.items():
        failed += len(run(args, cell, methods))
    with alone(Path(args.work) / "report.lock"):
        reproduce_report.write(args.out, args.work)
    return 1 if failed else 0


if __name__ == "__main__":
    runtime.command(main)
