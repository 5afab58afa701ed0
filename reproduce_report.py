"""Of the cells of reproduce.py: the tables in the paper's layout, its claims against the numbers, Figures 3 and 4.

In    OUT/*.json                     cells
      WORK/<cell>/*.h5, *.pt         what the figures show; a figure whose files are gone is left as it is
Out   OUT/tables.md, OUT/figure3.png, OUT/figure4.png

python reproduce.py --table none --out results/reproduce          # writes them again, runs nothing
"""

import json
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

import evaluate
import reproduce
import reproduce_figures
import runtime
from reproduce_data import TITLES

NAMES = {
    "noisy": "Noisy",
    "supervised": "Supervised",
    "nlm": "Non-local means, level measured",
    "nlm-calibrated": "Non-local means, calibrated",
    "tv": "Total variation, calibrated",
    "wavelet": "Wavelets, calibrated",
    "noise2self": "Noise2Self",
    "lgbpn": "LG-BPN",
    "puca": "PUCA",
    "nei2nei": "Neighbor2Neighbor",
    "paper": "Paper's recipe",
    "paper-2": "Paper's recipe, round 2",
    "paper-3": "Paper's recipe, round 3",
    "ours": "Our recipe (recorruption)",
    "ours-2": "Our recipe, round 2",
    "ours-3": "Our recipe, round 3",
    "single": "no SRDS, no KD",
    "srds": "SRDS",
    "kd-single": "KD",
    "single25": "no SRDS, no KD, 25 steps",
    "srds25": "SRDS, 25 steps",
}
# The paper's tables: {table: (columns, {method: cells})}.
PAPER = {
    1: (
        "Brain T2w, Gaussian | Brain T2w, Poisson | Knee, Gaussian | Knee, Poisson | Chest, Gaussian | Chest, Poisson",
        {
            "noisy": "32.57/0.769 31.34/0.849 32.57/0.828 30.39/0.798 32.57/0.782 31.20/0.734",
            "supervised": "37.95/0.946 36.40/0.946 36.59/0.902 35.17/0.881 37.55/0.914 37.21/0.906",
            "noise2self": "33.00/0.895 32.60/0.892 32.26/0.751 31.71/0.734 32.93/0.784 33.06/0.784",
            "lgbpn": "32.61/0.903 33.14/0.902 32.58/0.761 32.20/0.751 34.54/0.840 35.05/0.841",
            "puca": "35.45/0.909 34.14/0.908 33.82/0.797 31.72/0.749 35.56/0.856 34.11/0.822",
            "nei2nei": "36.69/0.935 35.47/0.930 36.08/0.894 34.48/0.864 36.12/0.894 35.56/0.880",
            "paper": "36.68/0.942 35.44/0.942 36.02/0.897 35.31/0.893 35.95/0.905 35.30/0.901",
        },
    ),
    2: (
        "Knee, Gaussian 0.5 | Gaussian 1.2 | Poisson 0.5 | Poisson 1.2 | Gamma 0.5 | Gamma 1.2",
        {
            "noisy": "32.57/0.830 32.57/0.846 30.40/0.801 30.39/0.823 32.92/0.896 32.92/0.908",
            "supervised": "36.41/0.900 36.33/0.914 35.33/0.898 35.14/0.905 36.84/0.913 36.61/0.917",
            "lgbpn": "31.78/0.729 30.59/0.703 31.62/0.724 30.65/0.705 31.69/0.728 30.69/0.706",
            "puca": "32.57/0.769 32.23/0.760 32.20/0.761 32.03/0.756 32.39/0.764 31.91/0.751",
            "nei2nei": "35.68/0.881 33.91/0.850 34.27/0.859 32.35/0.839 35.37/0.889 34.13/0.891",
            "paper": "35.99/0.892 35.31/0.878 34.92/0.881 34.85/0.869 36.63/0.905 35.40/0.895",
        },
    ),
    3: (
        "M4Raw T1w | M4Raw FLAIR",
        {
            "noisy": "30.19/0.796 29.95/0.781",
            "supervised": "32.17/0.888 31.65/0.844",
            "nei2nei": "31.11/0.898 30.71/0.869",
            "lgbpn": "30.20/0.871 29.22/0.795",
            "puca": "31.50/0.898 31.16/0.852",
            "paper": "31.95/0.900 31.44/0.864",
        },
    ),
    4: (
        "Knee, white | Knee, 0.5 | Knee, 1.2",
        {
            "noisy": "32.57/0.828 32.57/0.830 32.57/0.846",
            "paper": "36.02/0.897 35.99/0.892 35.31/0.878",
            "paper-2": "36.10/0.900 36.05/0.898 35.98/0.893",
            "paper-3": "36.11/0.899 36.09/0.899 36.07/0.898",
        },
    ),
    5: (
        "Knee, white | Knee, 0.5 | Knee, 1.2",
        {
            "single": "33.48/0.793 33.88/0.768 31.50/0.729",
            "srds": "35.87/0.896 35.73/0.890 34.95/0.874",
            "kd-single": "33.15/0.781 32.90/0.754 30.61/0.713",
            "paper": "36.02/0.897 35.99/0.892 35.31/0.878",
        },
    ),
}
HEADS = {
    1: "white noise",
    2: "correlated noise (blurred by 0.5 or 1.2 pixels)",
    3: "real noise",
    4: "rounds, Gaussian noise",
    5: "SRDS and knowledge distillation (KD), Gaussian noise",
}


class Column:
    """The cells of one dataset and noise, all seeds."""

    def __init__(self, runs):
        self.runs, (dataset, self.kind, self.correlation) = runs, key_of(runs[0])
        words = [self.kind.capitalize() if self.kind else "", f"{self.correlation:g}" if self.correlation else ""]
        self.title = ", ".join(w for w in (TITLES[dataset], " ".join(words).strip()) if w)

    def has(self, method):
        return all(method in run["methods"] for run in self.runs)

    def mean(self, method, measure):
        return float(np.mean([run["methods"][method][measure] for run in self.runs]))

    def slices(self, method, measure):
        return np.concatenate([run["methods"][method]["slices"][measure] for run in self.runs])

    def best(self, methods, measure):
        """The method of the highest mean, if it is above each of the others at p < 0.05, else None."""
        rivals = [m for m in methods if m not in ("noisy", "supervised") and self.has(m)]
        first = max(rivals, key=lambda m: self.mean(m, measure), default=None)
        gaps = [self.slices(first, measure) - self.slices(m, measure) for m in rivals if m != first]
        return first if gaps and all(np.any(gap) and wilcoxon(gap).pvalue < 0.05 for gap in gaps) else None


def key_of(run):
    return run["dataset"], run["noise"]["kind"], run["noise"]["correlation"]


def columns(runs, table):
    """The columns of a table that have been run, at least in part."""
    sets, groups = [name for name in TITLES if any(run["dataset"] == name for run in runs)], {}
    for *key, seed in reproduce.cells(table, runs[0]["scale"], sets):
        found = [run for run in runs if (*key_of(run), run["seed"]) == (*key, seed)]
        found = [run for run in found if any(m in run["methods"] for m in reproduce.METHODS[table] if m != "nlm")]
        if found:
            groups.setdefault(tuple(key), []).extend(found)
    return [Column(group) for group in groups.values()]


def markdown(table, cols):
    """A table in the paper's layout, and the paper's own below."""
    order = [m for m in ("noisy", *reproduce.METHODS[table]) if any(col.has(m) for col in cols)]
    lines = [f"## Table {table}: {HEADS[table]}", "", f"| | {' | '.join(c.title for c in cols)} |"]
    lines.append("|---" * (len(cols) + 1) + "|")
    best = {measure: [col.best(order, measure) for col in cols] for measure in ("psnr", "ssim")}
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
    seeds = max(len(col.runs) for col in cols)
    lines += ["", f"PSNR/SSIM. Test images: {', '.join(map(str, counts))}; seeds of the training: {seeds}.", ""]
    heads, rows = PAPER[table]
    lines += ["The paper's, on its data:", "", f"| | {heads} |", "|---" * (heads.count("|") + 2) + "|"]
    lines += [f"| {name[method]} | {' | '.join(numbers.split())} |" for method, numbers in rows.items()]
    return [*lines, ""]


def extras(cols):
    """Noise leak, and seconds of one processor core, of the methods of Table 1."""
    order = [m for m in NAMES if m in reproduce.METHODS[1] and all(col.has(m) for col in cols)]
    heads = [col.title for col in cols]
    lines = ["## Noise leak and cost, cells of Table 1", ""]
    lines += [f"| | {' | '.join(f'leak, {h}' for h in heads)} | {' | '.join(f'seconds, {h}' for h in heads)} |"]
    lines += ["|---" * (2 * len(cols) + 1) + "|"]
    for method in order:
        leaks = [f"{col.mean(method, 'leak'):.2f}" for col in cols]
        seconds = [f"{col.mean(method, 'processor_seconds'):.0f}" for col in cols]
        lines.append(f"| {NAMES[method]} | {' | '.join(leaks)} | {' | '.join(seconds)} |")
    note = "Seconds: processor time of all stages that a method stands on, training and prediction together."
    return [*lines, "", note, ""]


def claims(tables):
    """What the paper claims in Secs. 4.3 to 4.5, as differences of PSNR or SSIM between two rows, and what came out."""

    def gaps(table, method, other, measure="psnr", where=lambda col: True):
        cols = [c for c in tables.get(table, []) if where(c) and c.has(method)]
        others = [other] if isinstance(other, str) else other
        found = []
        for c in cols:
            rivals = [c.mean(o, measure) for o in others if c.has(o)]
            if rivals:
                found.append(c.mean(method, measure) - max(rivals))
        return found

    blind = ["noise2self", "lgbpn", "puca", "nei2nei"]
    rows = [
        (
            "4.3",
            "the paper's recipe has the highest SSIM of the self-supervised (white)",
            "all 6",
            1,
            gaps(1, "paper", blind, "ssim"),
        ),
        (
            "4.3",
            "its PSNR is close to Neighbor2Neighbor's or higher (white)",
            "-0.26 to +0.83",
            1,
            gaps(1, "paper", "nei2nei"),
        ),
        ("4.3", "about 4 dB above the noisy images (white)", "+3.4 to +4.9", 1, gaps(1, "paper", "noisy")),
        ("4.3", "supervised training is 1 dB higher (white)", "-0.14 to +1.9", 1, gaps(1, "supervised", "paper")),
        ("4.3", "highest PSNR of the self-supervised (correlated)", "+0.3 to +2.5", 1, gaps(2, "paper", blind)),
        ("4.3", "highest SSIM of the self-supervised (correlated)", "all 6", 1, gaps(2, "paper", blind, "ssim")),
        ("4.4", "above PUCA on real noise", "+0.45, +0.28", 1, gaps(3, "paper", "puca")),
        ("4.5", "SRDS gains over one sample", "+2.39, +1.85, +3.45", 1, gaps(5, "srds", "single")),
        ("4.5", "the same with 25 steps", "", 1, gaps(5, "srds25", "single25")),
        ("4.5", "distillation gains over SRDS", "+0.15, +0.26, +0.36", 1, gaps(5, "paper", "srds")),
        ("4.5", "without SRDS distillation makes it worse", "-0.33, -0.98, -0.89", -1, gaps(5, "kd-single", "single")),
        ("4.5", "round 2 gains over round 1", "+0.08, +0.06, +0.67", 1, gaps(4, "paper-2", "paper")),
        ("4.5", "round 3 gains over round 2", "+0.01, +0.04, +0.09", 1, gaps(4, "paper-3", "paper-2")),
        (
            "ours",
            "our recipe above every self-supervised network, the paper's included (white)",
            "",
            1,
            gaps(1, "ours", [*blind, "paper"]),
        ),
        ("ours", "the same (correlated)", "", 1, gaps(2, "ours", [*blind, "paper"])),
        ("ours", "our recipe above non-local means (white)", "", 1, gaps(1, "ours", "nlm")),
        ("ours", "the same (correlated)", "", 1, gaps(2, "ours", "nlm")),
        ("ours", "our recipe against supervised training (white)", "", 0, gaps(1, "ours", "supervised")),
        ("ours", "the same (correlated)", "", 0, gaps(2, "ours", "supervised")),
        ("ours", "round 2 of our recipe over round 1", "", 1, gaps(4, "ours-2", "ours")),
    ]
    lines = [
        "## The claims",
        "",
        "Differences of PSNR in dB (SSIM where said), a number for each column of the table.",
        "",
    ]
    lines += ["| Sec. | claim | paper | here | |", "|---|---|---|---|---|"]
    for section, claim, theirs, sign, found in rows:
        if found:
            right = sum(gap * sign > 0 for gap in found)
            said = {len(found): "confirmed", 0: "refuted"}.get(right, f"{right} of {len(found)}") if sign else ""
            digits = 3 if "SSIM" in claim else 2
            numbers = ", ".join(f"{gap:+.{digits}f}" for gap in found)
            lines.append(f"| {section} | {claim} | {theirs} | {numbers} | {said} |")
    drops = {m: [] for m in (*blind[1:], "paper", "ours", "nlm", "supervised")}
    pairs = {}
    for col in tables.get(2, []):
        pairs.setdefault(col.kind, {})[col.correlation] = col
    for pair in pairs.values():
        if len(pair) == 2:
            for method, found in drops.items():
                if all(col.has(method) for col in pair.values()):
                    found.append(pair[1.2].mean(method, "psnr") - pair[0.5].mean(method, "psnr"))
    if any(drops.values()):
        lines += [
            "",
            "From correlation 0.5 to 1.2 (Gaussian, Poisson, Gamma; in the paper its own recipe loses 0.68, "
            "0.07, 1.23, the others 1 to 2 dB):",
            "",
            "| | change of PSNR, dB |",
            "|---|---|",
        ]
        lines += [
            f"| {NAMES[m]} | {', '.join(f'{gap:+.2f}' for gap in found)} |" for m, found in drops.items() if found
        ]
    return [*lines, ""]


def write(out, work):
    """Writes the tables of all cells in the folder `out`, and the figures that the files in `work` allow."""
    out, work = Path(out), Path(work)
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*-s[0-9]*.json"))]
    if not runs:
        raise ValueError(f"{out} holds no cell of reproduce.py")
    tables = {table: cols for table in PAPER if (cols := columns(runs, table))}
    budget = {run["budget"] for run in runs} - {None}
    commits = sorted({run["commit"] for run in runs})
    lines = [
        "# The tables of the paper, run here",
        "",
        f"Scale {runs[0]['scale']}"
        + (f": every learned method has {max(budget):g} seconds of training on one core. " if budget else ". ")
        + f"{len(runs)} cells by `reproduce.py`, commit {', '.join(commits)}; this file by `reproduce_report.py`.",
        "",
        evaluate.PROTOCOL.replace("; mean ± sd over slices", "; means over slices"),
        "Bold: the best of the self-supervised, if it is above each other one at p < 0.05 (paired Wilcoxon test over "
        "the test images).",
        "",
    ]
    for table, cols in tables.items():
        lines += markdown(table, cols)
        if table == 1:
            lines += extras(cols)
    lines += claims(tables)
    with runtime.whole(out / "tables.md") as temporary:
        temporary.write_text("\n".join(lines))
    print(f"reproduce: {len(runs)} cells -> {out / 'tables.md'}", flush=True)
    full = [
        reproduce.name_of(*key_of(run), run["seed"])
        for run in runs
        if run["noise"]["kind"] == "gaussian" and run["seed"] == 0 and set(reproduce.RIVALS) <= set(run["methods"])
    ]
    full = [cell for cell in full if (work / cell / "recorrupted_out.h5").exists()]
    if full:
        reproduce_figures.figure3(out, work, full, NAMES)
        reproduce_figures.figure4(out, work / full[-1])
        print(f"reproduce: {out / 'figure3.png'}, {out / 'figure4.png'}", flush=True)


if __name__ == "__main__":
    raise SystemExit("run `python reproduce.py --table none`")
