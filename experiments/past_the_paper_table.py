"""results/past_the_paper.md from the cells of past_the_paper.sh; the number of seeds stands in brackets.

python -m experiments.past_the_paper_table FOLDER...          # each holds DATA-NOISE-SEED/cell.json
"""

import json
import sys
from pathlib import Path

ROWS = {
    "noisy": "noisy", "nlm": "non-local means, noise measured", "bsn": "blind-spot network",
    "posterior": "blind-spot network, posterior update", "posterior_oracle": "the same, noise known",
    "srds_plain": "SRDS pair, residual form", "posterior_srds": "SRDS pair, posterior update",
    "srds_hidden": "SRDS pair, hidden condition", "posterior_hidden": "the same, posterior update",
    "student_plain": "student of SRDS (paper)", "student_hidden": "student of SRDS, hidden condition",
    "student_posterior": "student of the posterior", "student_recorrupted": "student by recorruption",
    "oracle_noise": "student by recorruption, noise known", "supervised": "supervised",
}  # fmt: skip


def main():
    cells = {}
    for folder in sorted(p for root in sys.argv[1:] for p in Path(root).iterdir() if (p / "cell.json").exists()):
        data, noise, _ = folder.name.rsplit("-", 2)
        cells.setdefault((data, noise), []).append(json.loads((folder / "cell.json").read_text()))
    for title, key, digits in (("PSNR, dB", "psnr", 2), ("SSIM", "ssim", 3), ("Leak", "leak", 2)):
        print(f"\n## {title}\n\n| | {' | '.join(f'{d} {n} ({len(c)})' for (d, n), c in cells.items())} |")
        print("|---" * (len(cells) + 1) + "|")
        for row, name in ROWS.items():
            values = []
            for runs in cells.values():
                numbers = [run[row][key] for run in runs if row in run]
                values.append(f"{sum(numbers) / len(numbers):.{digits}f}" if numbers else "")
            if any(values):
                print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
