"""From the cells of reproduce.py: the tables in the paper's layout, its claims against the numbers, Figures 3 and 4.

    In    OUT/*.json                     cells
          WORK/<cell>/*.h5, *.pt         what the figures show; a figure whose files are gone is left as it is
    Out   OUT/tables.md, OUT/figure3.png, OUT/figure4.png

    python -m experiments.reproduce --table none --out results/reproduce          # writes them again, runs nothing

A claim is "refuted" only at the scale of the paper: short training can show that it holds, not that it does not.
"""

import json
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

import evaluate
from experiments import reproduce_figures
from experiments.reproduce_data import METHODS, RIVALS, TITLES, TOLD, cells, key_of, name_of
from lib import runtime

NAMES = {
    "noisy": "Noisy", "bm3d": "BM3D, told", "bm4d": "BM4D (3D), told", "supervised": "Supervised",
    "nlm": "Non-local means, level measured",
    "nlm-calibrated": "Non-local means, calibrated", "tv": "Total variation, calibrated",
    "wavelet": "Wavelets, calibrated", "noise2self": "Noise2Self", "lgbpn": "LG-BPN", "puca": "PUCA",
    "nei2nei": "Neighbor2Neighbor", "paper": "Paper's recipe", "paper-2": "Paper's recipe, round 2",
    "paper-3": "Paper's recipe, round 3", "ours": "Our recipe (recorruption)", "ours-2": "Our recipe, round 2",
    "posterior": "PUCA, posterior update", "ours-3": "Our recipe, round 3", "default": "Our default (shipped, tuned)",
    "single": "no SRDS, no KD", "srds": "SRDS", "kd-single": "KD",
    "single25": "no SRDS, no KD, 25 steps", "srds25": "SRDS, 25 steps",
    "n2v": "Noise2Void", "r2r": "Recorrupted2Recorrupted", "n2n": "Noise2Noise", "c2s": "Corruption2Self",
    "swinir": "SwinIR, supervised", "restormer": "Restormer, supervised",
}  # fmt: skip
BOLD = (
    "Bold: the best of the self-supervised, if it is above each other one at p < 0.05 (paired Wilcoxon test over "
    "the test images, one-sided; neighbouring slices of one volume are not independent)."
)
GAPS = (
    "Differences of PSNR in dB, or of SSIM, between the paper's recipe (or ours) and another row; a number for\n"
    "each column. Seen: as claimed in every column, at p < 0.05 where a sign is claimed."
)
# The paper's own tables: for each, what it is about and its columns, then PSNR/SSIM of each method.
PAPER_TEXT = """
white noise
Brain T2w, Gaussian | Brain T2w, Poisson | Knee, Gaussian | Knee, Poisson | Chest, Gaussian | Chest, Poisson
noisy      32.57/0.769 31.34/0.849 32.57/0.828 30.39/0.798 32.57/0.782 31.20/0.734
supervised 37.95/0.946 36.40/0.946 36.59/0.902 35.17/0.881 37.55/0.914 37.21/0.906
noise2self 33.00/0.895 32.60/0.892 32.26/0.751 31.71/0.734 32.93/0.784 33.06/0.784
lgbpn      32.61/0.903 33.14/0.902 32.58/0.761 32.20/0.751 34.54/0.840 35.05/0.841
puca       35.45/0.909 34.14/0.908 33.82/0.797 31.72/0.749 35.56/0.856 34.11/0.822
nei2nei    36.69/0.935 35.47/0.930 36.08/0.894 34.48/0.864 36.12/0.894 35.56/0.880
paper      36.68/0.942 35.44/0.942 36.02/0.897 35.31/0.893 35.95/0.905 35.30/0.901

correlated noise (blurred by 0.5 or 1.2 pixels)
Knee, Gaussian 0.5 | Gaussian 1.2 | Poisson 0.5 | Poisson 1.2 | Gamma 0.5 | Gamma 1.2
noisy      32.57/0.830 32.57/0.846 30.40/0.801 30.39/0.823 32.92/0.896 32.92/0.908
supervised 36.41/0.900 36.33/0.914 35.33/0.898 35.14/0.905 36.84/0.913 36.61/0.917
lgbpn      31.78/0.729 30.59/0.703 31.62/0.724 30.65/0.705 31.69/0.728 30.69/0.706
puca       32.57/0.769 32.23/0.760 32.20/0.761 32.03/0.756 32.39/0.764 31.91/0.751
nei2nei    35.68/0.881 33.91/0.850 34.27/0.859 32.35/0.839 35.37/0.889 34.13/0.891
paper      35.99/0.892 35.31/0.878 34.92/0.881 34.85/0.869 36.63/0.905 35.40/0.895

real noise
M4Raw T1w | M4Raw FLAIR
noisy      30.19/0.796 29.95/0.781
supervised 32.17/0.888 31.65/0.844
nei2nei    31.11/0.898 30.71/0.869
lgbpn      30.20/0.871 29.22/0.795
puca       31.50/0.898 31.16/0.852
paper      31.95/0.900 31.44/0.864

rounds, Gaussian noise
Knee, white | Knee, 0.5 | Knee, 1.2
noisy      32.57/0.828 32.57/0.830 32.57/0.846
paper      36.02/0.897 35.99/0.892 35.31/0.878
paper-2    36.10/0.900 36.05/0.898 35.98/0.893
paper-3    36.11/0.899 36.09/0.899 36.07/0.898

SRDS and knowledge distillation (KD), Gaussian noise
Knee, white | Knee, 0.5 | Knee, 1.2
single     33.48/0.793 33.88/0.768 31.50/0.729
srds       35.87/0.896 35.73/0.890 34.95/0.874
kd-single  33.15/0.781 32.90/0.754 30.61/0.713
paper      36.02/0.897 35.99/0.892 35.31/0.878
"""
PAPER = {}  # {table: (what it is about, columns, {method: [PSNR/SSIM]})}
for block in PAPER_TEXT.strip().split("\n\n"):
    about, heads, *rows = block.splitlines()
    PAPER[len(PAPER) + 1] = about, heads, {method: numbers for method, *numbers in map(str.split, rows)}
M4RAW = {  # Corruption2Self's table, on M4Raw: T1w, T2w, FLAIR
    "n2v": ["31.46/0.870"], "noise2self": ["31.72/0.887"], "r2r": ["31.67/0.876"], "n2n": ["32.59/0.911"],
    "c2s": ["32.77/0.919", "32.33/0.890", "32.51/0.876"], "swinir": ["32.53/0.913"], "restormer": ["32.35/0.912"],
}  # fmt: skip
ABOUT = {
    **PAPER,
    "m4raw": ("single repetitions against the mean of six, as of Corruption2Self", "T1w | T2w | FLAIR", M4RAW),
}


class Column:
    """The cells of one dataset and noise, all seeds."""

    def __init__(self, runs):
        self.runs, (dataset, self.kind, self.correlation) = runs, key_of(runs[0])
        words = [self.kind.capitalize() if self.kind else "", f"{self.correlation:g}" if self.correlation else ""]
        self.title = ", ".join(w for w in (TITLES[dataset], " ".join(words).strip()) if w)

    def has(self, *methods):
        return all(method in run["methods"] for run in self.runs for method in methods)

    def mean(self, method, measure):
        return float(np.mean([run["methods"][method][measure] for run in self.runs]))

    def apart(self, method, measure):
        """By how much the seeds differ."""
        return float(np.ptp([run["methods"][method][measure] for run in self.runs]))

    def slices(self, method, measure):
        """The mean over the seeds, for each test image."""
        return np.mean([run["methods"][method]["slices"][measure] for run in self.runs], axis=0)

    def above(self, method, other, measure="psnr"):
        """p of the paired Wilcoxon test that `method` is above `other`, image by image (one-sided)."""
        gaps = self.slices(method, measure) - self.slices(other, measure)
        return float(wilcoxon(gaps, alternative="greater").pvalue) if np.any(gaps) else 1.0

    def best(self, methods, measure):
        """The self-supervised method of the highest mean, if it is above each of the others at p < 0.05, else None."""
        rivals = [m for m in methods if m not in ("noisy", "supervised", *TOLD)]
        if not self.has(*rivals) or len(rivals) < 2:
            return None
        first = max(rivals, key=lambda m: self.mean(m, measure))
        return first if all(self.above(first, m, measure) < 0.05 for m in rivals if m != first) else None


def columns(runs, table):
    """The columns of a table that have been run: of each, the seeds with all of its methods, or else the first seed."""
    sets, groups = [name for name in TITLES if any(run["dataset"] == name for run in runs)], {}
    own = [m for m in METHODS[table] if table not in (4, 5) or m not in RIVALS]  # methods that no other table has
    for *key, seed in cells(table, runs[0]["scale"], sets, 1 + max(run["seed"] for run in runs)):
        found = [run for run in runs if (*key_of(run), run["seed"]) == (*key, seed)]
        if any(m in run["methods"] for run in found for m in own):
            groups.setdefault(tuple(key), []).extend(found)
    complete = {k: [r for r in group if set(METHODS[table]) <= {*r["methods"], *TOLD}] for k, group in groups.items()}
    return [Column(complete[key] or group[:1]) for key, group in groups.items()]


def markdown(table, cols):
    """A table in the paper's layout, and below it the paper's own."""
    order = [m for m in ("noisy", *METHODS[table]) if any(col.has(m) for col in cols)]
    about, heads, rows = ABOUT[table]
    lines = [f"## Table {table}: {about}", "", f"| | {' | '.join(c.title for c in cols)} |"]
    lines.append("|---" * (len(cols) + 1) + "|")
    best = {measure: [col.best(METHODS[table], measure) for col in cols] for measure in ("psnr", "ssim")}
    name = {**NAMES, "paper": "SRDS, KD"} if table == 5 else NAMES
    for method in order:
        entries = []
        for k, col in enumerate(cols):
            if not col.has(method):
                entries.append("")
                continue
            texts = [f"{col.mean(method, 'psnr'):.2f}", f"{col.mean(method, 'ssim'):.3f}"]
            bold = [best[measure][k] == method for measure in ("psnr", "ssim")]
            entries.append("/".join(f"**{t}**" if b else t for t, b in zip(texts, bold)))
        lines.append(f"| {name[method]} | {' | '.join(entries)} |")
    counts = sorted({int(col.runs[0]["methods"]["noisy"]["n"]) for col in cols})
    seeds = [len(col.runs) for col in cols]
    apart = max(col.apart(m, "psnr") for col in cols for m in order if col.has(m))
    said = f"{seeds[0]}" if len(set(seeds)) == 1 else f"{', '.join(map(str, seeds))}, column by column"
    said += f"; the same method differs by at most {apart:.2f} dB between them" if max(seeds) > 1 else ""
    lines += ["", f"PSNR/SSIM. Test images: {', '.join(map(str, counts))}; seeds of the training: {said}.", ""]
    lines += [
        "Corruption2Self's, on M4Raw:" if table == "m4raw" else "The paper's, on its data:",
        "",
        f"| | {heads} |",
        "|---" * (heads.count("|") + 2) + "|",
    ]
    lines += [f"| {name[method]} | {' | '.join(numbers)} |" for method, numbers in rows.items()]
    return [*lines, ""]


def over_sets(cols):
    """What each method of Table 1 gains over the noisy images, dB: mean and standard error over the image sets."""
    kinds = {kind: [col for col in cols if col.kind == kind] for kind in dict.fromkeys(col.kind for col in cols)}
    lines = ["## Gain over the noisy images, cells of Table 1", ""]
    lines += [f"| | {' | '.join(kind.capitalize() for kind in kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for method in (m for m in METHODS[1] if any(col.has(m) for col in cols)):
        entries = []
        for some in kinds.values():
            gains = [col.mean(method, "psnr") - col.mean("noisy", "psnr") for col in some if col.has(method)]
            error = f" ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
            entries.append(f"{np.mean(gains):+.2f}{error} ({len(gains)})" if gains else "")
        lines.append(f"| {NAMES[method]} | {' | '.join(entries)} |")
    return [*lines, "", "PSNR, dB: mean ± standard error over the image sets, and how many they are.", ""]


def leak_and_cost(cols):
    """Noise leak, and seconds of one processor core, of the methods of Table 1."""
    order = [m for m in NAMES if m in METHODS[1] and all(col.has(m) for col in cols)]
    heads = [f"{word}, {col.title}" for word in ("leak", "seconds") for col in cols]
    lines = [
        "## Noise leak and cost, cells of Table 1",
        "",
        f"| | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for method in order:
        leaks = [f"{col.mean(method, 'leak'):.2f}" for col in cols]
        seconds = [f"{col.mean(method, 'processor_seconds'):.0f}" for col in cols]
        lines.append(f"| {NAMES[method]} | {' | '.join(leaks)} | {' | '.join(seconds)} |")
    note = (
        "Seconds: processor time of all stages that a method stands on, training and prediction together; a stage that"
    )
    return [*lines, "", f"{note} was interrupted counts from its last start.", ""]


def claims(tables):
    """What the paper claims, as differences of PSNR or SSIM between two rows, and what came out: Markdown lines.

    tables: {table: its columns}.
    """

    def gaps(table, method, others, measure="psnr"):
        """[(difference from the best of the others, p that it is positive, p that it is negative)], a column each."""
        found, others = [], [others] if isinstance(others, str) else others
        others = [m for m in others if m in ("noisy", *METHODS[table])]
        for col in tables.get(table, []):
            if col.has(method, *others):
                other = max(others, key=lambda m: col.mean(m, measure))
                gap = col.mean(method, measure) - col.mean(other, measure)
                found.append((gap, col.above(method, other, measure), col.above(other, method, measure)))
        return found

    blind = ["noise2self", "lgbpn", "puca", "nei2nei"]
    rivals = [*blind, "paper"]
    # (section, claim, the paper's numbers, what is claimed, what came out). Claimed is a sign, +1 or -1, for which
    # p < 0.05 decides, or an interval of dB; None: nothing is claimed.
    rows = [
        ("4.3", "highest SSIM of the self-supervised, white noise", "all 6", 1, gaps(1, "paper", blind, "ssim")),
        ("4.3", "PSNR close to Neighbor2Neighbor or higher", "-0.26 to +0.83", (-0.3, 9), gaps(1, "paper", "nei2nei")),
        ("4.3", "PSNR about 4 dB above noisy", "+3.4 to +4.9", (3, 9), gaps(1, "paper", "noisy")),
        ("4.3", "PSNR about 1 dB below supervised", "-1.9 to +0.14", (-2, 9), gaps(1, "paper", "supervised")),
        ("4.3", "highest PSNR of the self-supervised, correlated noise", "all 6", 1, gaps(2, "paper", blind)),
        ("4.3", "highest SSIM of the self-supervised, correlated noise", "all 6", 1, gaps(2, "paper", blind, "ssim")),
        ("4.4", "PSNR above PUCA, real noise", "+0.45, +0.28", 1, gaps(3, "paper", "puca")),
        ("4.5", "SRDS gains over its condition, PUCA", "+2.05, +3.95, +4.36", 1, gaps(5, "srds", "puca")),
        ("4.5", "the student gains over the condition", "+2.20, +4.21, +4.72", 1, gaps(5, "paper", "puca")),
        ("4.5", "SRDS gains over one sample", "+2.39, +1.85, +3.45", 1, gaps(5, "srds", "single")),
        ("4.5", "the same with 25 steps", "", 1, gaps(5, "srds25", "single25")),
        ("4.5", "distillation gains over SRDS", "+0.15, +0.26, +0.36", 1, gaps(5, "paper", "srds")),
        ("4.5", "without SRDS distillation loses", "-0.33, -0.98, -0.89", -1, gaps(5, "kd-single", "single")),
        ("Table 4", "round 2 gains over round 1", "+0.08, +0.06, +0.67", 1, gaps(4, "paper-2", "paper")),
        ("Table 4", "round 3 gains over round 2", "+0.01, +0.04, +0.09", 1, gaps(4, "paper-3", "paper-2")),
        ("ours", "the posterior update gains over PUCA, white noise", "", 1, gaps(1, "posterior", "puca")),
        ("ours", "the same, correlated noise", "", 1, gaps(2, "posterior", "puca")),
        ("ours", "default above every self-supervised network, white noise", "", 1, gaps(1, "default", rivals)),
        ("ours", "the same, correlated noise", "", 1, gaps(2, "default", rivals)),
        ("ours", "default above non-local means, white noise", "", 1, gaps(1, "default", "nlm")),
        ("ours", "the same, correlated noise", "", 1, gaps(2, "default", "nlm")),
        ("ours", "default above BM3D told the truth, white noise", "", 1, gaps(1, "default", "bm3d")),
        ("ours", "the same, correlated noise", "", 1, gaps(2, "default", "bm3d")),
        ("ours", "default above BM4D told the truth, white noise", "", 1, gaps(1, "default", "bm4d")),
        ("ours", "the same, correlated noise", "", 1, gaps(2, "default", "bm4d")),
        ("ours", "against supervised, white noise (goal -0.1)", "", (-0.1, 9), gaps(1, "default", "supervised")),
        ("ours", "the same, correlated noise (goal -0.3)", "", (-0.3, 9), gaps(2, "default", "supervised")),
        ("ours", "default against the paper's recipe, real noise", "", None, gaps(3, "default", "paper")),
        ("ours", "round 2 gains over round 1", "", 1, gaps(4, "ours-2", "ours")),
        ("ours", "round 3 gains over round 2", "", 1, gaps(4, "ours-3", "ours-2")),
    ]
    scales = {run["scale"] for cols in tables.values() for col in cols for run in col.runs}
    against = "refuted" if scales == {"paper"} else "not seen at this budget"
    lines = ["## The claims", "", GAPS, f"{against.capitalize()}: the reverse in every column."]
    if against != "refuted":
        lines.append("Training as short as this cannot refute what the paper claims for longer training.")
    lines += ["", "| Sec. | claim | paper | here | |", "|---|---|---|---|---|"]
    for section, claim, theirs, claimed, found in rows:
        if found:
            digits = 3 if "SSIM" in claim else 2
            numbers = ", ".join(f"{gap:+.{digits}f}" for gap, _, _ in found)
            lines.append(f"| {section} | {claim} | {theirs} | {numbers} | {verdict(claimed, found, against)} |")
    return [*lines, "", *robustness(tables.get(2, []))]


def verdict(claimed, found, against):
    """What the differences [(gap, p above, p below)] say of a claim; `claimed` as in `claims`.

    "seen" if it holds in all columns, `against` if the reverse does, else the number of columns for and against it.
    """
    if claimed is None:
        return ""
    if isinstance(claimed, tuple):
        right = sum(claimed[0] <= gap <= claimed[1] for gap, _, _ in found)
        wrong = len(found) - right
    else:
        right, wrong = (sum(p[1 if sign > 0 else 2] < 0.05 for p in found) for sign in (claimed, -claimed))
    if right == len(found) or wrong == len(found):
        return "seen" if right else against
    return f"{right} for, {wrong} against, of {len(found)}"


def robustness(cols):
    """Sec. 4.3: what every method loses when the correlation grows from 0.5 to 1.2; Markdown lines."""
    pairs = {}
    for col in cols:
        pairs.setdefault(col.kind, {})[col.correlation] = col
    pairs = {kind: pair for kind, pair in pairs.items() if len(pair) == 2}
    lines = []
    for method in METHODS[2]:
        if pairs and all(col.has(method) for pair in pairs.values() for col in pair.values()):
            changes = [pair[1.2].mean(method, "psnr") - pair[0.5].mean(method, "psnr") for pair in pairs.values()]
            lines.append(f"| {NAMES[method]} | {', '.join(f'{change:+.2f}' for change in changes)} |")
    theirs = "in the paper -0.68, -0.07, -1.23 for its recipe, -1.77, -1.92, -1.24 for Neighbor2Neighbor"
    head = f"Change of PSNR, dB, from correlation 0.5 to 1.2 ({', '.join(pairs)}; {theirs}):"
    return [head, "", "| | |", "|---|---|", *lines, ""] if lines else []


def read_runs(out):
    """The cells that the folder `out` holds, as plain dicts."""
    return [json.loads(path.read_text()) for path in sorted(Path(out).glob("*-s[0-9]*.json"))]


def write(out, work):
    """Writes the tables of all cells in the folder `out`, and the figures that the files in `work` allow.

    Raises ValueError if there are no cells, or if their scales or budgets differ.
    """
    out, work = Path(out), Path(work)
    runs = read_runs(out)
    if not runs:
        raise ValueError(f"{out} holds no cell of reproduce.py")
    if len({(run["scale"], run["budget"]) for run in runs}) > 1:
        raise ValueError(f"{out} holds cells of several scales or budgets")
    tables = {table: cols for table in ABOUT if (cols := columns(runs, table))}
    budget, scale = runs[0]["budget"], f"Scale {runs[0]['scale']}"
    each = f": every learned method has {budget:g} seconds of training on one core, the paper's recipe for each network"
    scale += each if budget else ""
    commits = sorted({m["commit"] for run in runs for m in run["methods"].values() if "commit" in m})
    made = f"{len(runs)} cells by `experiments/reproduce.py`, commit {', '.join(commits)}"
    lines = ["# The tables of the paper, run here", ""]
    lines += [f"{scale}. {made}; this file by `experiments/reproduce_report.py`.", ""]
    lines += [evaluate.PROTOCOL.replace("; mean ± sd over slices", "; means over slices"), BOLD, ""]
    for table, cols in tables.items():
        lines += markdown(table, cols)
        if table == 1:
            lines += [*over_sets(cols), *leak_and_cost(cols)]
    lines += claims(tables)
    with runtime.atomic_write(out / "tables.md") as temporary:
        temporary.write_text("\n".join(lines))
    print(f"reproduce: {len(runs)} cells -> {out / 'tables.md'}", flush=True)
    write_figures(out, work, runs)


def write_figures(out, work, runs):
    """Figure 3 of all cells of Gaussian noise that have every rival, Figure 4 of the last of them."""
    names = [
        name_of(*key_of(run), run["seed"])
        for run in runs
        if run["noise"]["kind"] == "gaussian" and run["seed"] == 0 and set(RIVALS) <= set(run["methods"])
    ]
    for draw in (reproduce_figures.figure3, reproduce_figures.figure4) if names else ():
        try:
            print(f"reproduce: {draw(out, work, names, NAMES)}", flush=True)
        except ValueError as error:
            print(f"reproduce: no {draw.__name__}, {error}", flush=True)
