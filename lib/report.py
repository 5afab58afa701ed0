"""The page that a run leaves behind, report.html: before, after, what was removed, how sure, and where not to trust it.

While files are denoised, `look` keeps a row of numbers for each volume and nothing else. At the end `write` reads the
worst volumes again, at most SHOWN, and makes pictures of them; the others are rows of a table. The page is one file of
at most LIMIT bytes, which asks nothing of any other computer, and holds no name unless it is told to.

What it says is handed in, as `tools`, a dict (evaluate.report_tools makes it; a value may be None):

    measure    (y, x), slices (H,W) in [0,1] -> {name: number};  rank  of such measures -> number, above 1 is wrong
    verdict    of such measures -> [words], the worst first
    estimate   [stack (2k+1,h,w)] -> {"psnr", "sd", "noisy"}, dB;  context  k
    residual   (y, x) -> (residual in standard deviations (H,W), where there is noise (H,W))
    spectra    (residual, where) -> (frequencies, power, power of the noise)
    gains      (S,H,W) in [0,1] -> (S,H/8,W/8): how much stronger than by the law the noise is from place to place
    deviation  intensities in [0,1] -> standard deviation of the noise;  correlation  (2r+1,2r+1);  law  words
"""

import importlib.metadata
import json
import platform
import re
import sys
from pathlib import Path

import numpy as np

from lib import crops, files, formats, panels, residual, runtime

LIMIT = 5_000_000  # bytes of the page
SHOWN = 30  # volumes with pictures
ROWS = 5000  # of the table
PICTURES = 1_900_000  # bytes of all pictures, before base64
KINDS = dict(dicom="DICOM", nifti="NIfTI", hdf5="HDF5", tiff="TIFF", picture="picture", numpy="NumPy")


# ---------------------------------------------------------------------------------------------------------------
# volumes as they are looked at
# ---------------------------------------------------------------------------------------------------------------
def view(volume, out, kind, mapped=None, gains=None):
    """What the page needs of a formats.Volume and its denoised slices `out` (S,H,W), as a dict.

    gains: of the module; found when they are needed if they are None. mapped: (scale, offset) if the arrays
    hold numbers in [0,1], which are the file's own by number * scale + offset.
    """
    scale, offset = mapped or files.scaling(volume, *files.finite_range(volume.slices))
    found = dict(y=volume.slices, x=out, kind=KINDS.get(kind, kind), name=f"{volume.source}: {volume.name}")
    found |= dict(mapped=bool(mapped), scale=scale or 1.0, offset=offset, spacing=volume.spacing, axes=volume.axes)
    return found | dict(gains=gains)


def numbers(one, tools):
    """A row of the table: {"shape", "kind", "name", "measures", "rank"}; measures are means over three slices."""
    count, found = one["y"].shape[0], []
    for s in panels.some_slices(count, 3) if tools["measure"] else ():
        y, x = (panels.even(one, tools, s, one[key][s]) for key in "yx")
        if np.ptp(y):
            found.append(tools["measure"](y, x))
    m = {key: float(np.mean([f[key] for f in found])) for key in found[0]} if found else None
    rank = float(tools["rank"](m)) if m else 0.0
    return dict(shape=tuple(one["y"].shape), kind=one["kind"], name=one["name"], measures=m, rank=rank)


def look(rows, tools, job, volumes=(), made=()):
    """Sets rows[job] to the row of each volume that was just denoised; to None if it was there already. Raises nothing.

    rows: dict, by the name of a job's first output file. volumes, made: of formats.read and apply.denoise_volume.
    """
    rows[str(job.paths[0])] = None
    try:
        views = [view(volume, one.out, job.item.kind, gains=one.gains) for volume, one in zip(volumes, made)]
        rows[str(job.paths[0])] = [numbers(one, tools) for one in views] or None
    except Exception:  # a page is not worth a file: `of_run` tries again, and says what is wrong
        return


def of_files(job):
    """The views of a job whose files are written, read again."""
    readable, volumes = files.read(job, [], force=True)
    written = formats.read(readable.item._replace(files=tuple(readable.paths), root=readable.paths[0].parent))
    return [view(volume, out.slices, job.item.kind) for volume, out in zip(volumes, written)]


# ---------------------------------------------------------------------------------------------------------------
# words
# ---------------------------------------------------------------------------------------------------------------
def title(number, row, names):
    """'volume 3 (DICOM, 192 slices of 256x256)', or with the name of the file."""
    count, h, w = row["shape"]
    shape = f"{count} slices of {h}x{w}" if count > 1 else f"image of {h}x{w}"
    return f"volume {number} ({row['kind']}, {shape})" + (f" · {row['name']}" if names else "")


def masked(text, paths, seen):
    """A line of a problem without names: paths become '[file 1]', and what libraries quote is cut.

    paths: of `known_paths`. seen: dict, path to its number, which grows from line to line.
    """
    for path in paths:
        if path in text:
            name = re.escape(path)
            alone = rf"(?<!\w){name}(?!\w)" if "/" in path or "." in path else rf"^{name}(?!\w)|(?<!\w){name}(?=[:/])"
            if re.search(alone, text):
                number = seen.setdefault(path, len(seen) + 1)
                text = re.sub(rf"(?:{alone})(?:/[^\s:]*)?", f"[file {number}]", text)
    text = re.sub(r"(cannot be (?:read|copied)(?: as DICOM)?: \w+).*", r"\1", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "[name]", text)
    return " ".join("[name]" if re.search(r"[/\\^]", word) else word for word in text.split())


def known_paths(sources, jobs, out):
    """All paths that a problem may name, the longest first: what stands in one must not be cut by a shorter one."""
    paths = {str(out)} | {str(p) for job in jobs for p in (*job.item.files, *job.paths, *job.sides.values())}
    for source in map(Path, sources):
        paths |= {str(source)} | ({str(p) for p in source.rglob("*")} if source.is_dir() else set())
    return sorted(paths, key=len, reverse=True)


def typed(argv, secrets):
    """The command line as typed; without the values that are names of files and folders, unless `secrets` is empty."""
    hidden = [word if word.startswith("-") and "=" not in word else _hide(word, secrets) for word in argv]
    return " ".join(hidden)


def _hide(word, secrets):
    flag, _, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return (f"{flag}=" if flag else "") + "…" if value in secrets or word in secrets else word


def facts_of(args, ran, folder):
    """`facts` of `page_of_run`, by the arguments of denoise.py, without names unless asked to; ran: {name: text}."""
    secrets = [] if args.with_names else [*args.inputs, args.out, args.model, args.key, args.noise_map]
    told = dict(command=typed(["denoise.py", *sys.argv[1:]], secrets), seed=args.seed, versions=versions())
    return dict(sources=args.inputs, out=Path(args.out), folder=folder, run=[*{**told, **ran}.items()])


def stages_of(folder):
    """[(stage, seconds)] of stages.json in a folder, if there is one."""
    path = folder / "stages.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    return [
        (name, f"{one['seconds']:g} s") for name, one in done.items() if isinstance(one, dict) and one.get("seconds")
    ]


def candidates_of(folder):
    """[(candidate, estimated PSNR, whether it is the best)] of best.json in a folder, if there is one."""
    path = folder / "best.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    best = next((name for name, one in found.items() if one.get("kept")), None)
    said = {name: f"{one['psnr']:.2f} ± {one.get('sd', 0):.2f} dB" for name, one in found.items()}
    return [("images as they are" if name == "noisy" else name, text, name == best) for name, text in said.items()]


def versions():
    """What a run depends on, in words."""
    names = "torch", "numpy", "scipy"
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"DiffDenoise {runtime.RELEASE}, Python {platform.python_version()}, {found}"


# ---------------------------------------------------------------------------------------------------------------
# the page
# ---------------------------------------------------------------------------------------------------------------
def windows(one, tools, count):
    """At most `count` stacks (2 context + 1, h, w) in [0,1] from all over a view, of even noise, for the estimate.

    Whole slices if they have at most 256x256 pixels, else tiles of that size; of a single image at least quarters.
    """
    depth, h, w = one["y"].shape
    sides = [min(n, 256 if depth > 1 else min(256, max(64, n // 2))) for n in (h, w)]
    grid = [(t, u) for t in range(0, h - sides[0] + 1, sides[0]) for u in range(0, w - sides[1] + 1, sides[1])]
    slices = np.linspace(0, depth - 1, count + 2)[1:-1].round().astype(int)
    chosen = runtime.step_rng(0).permutation(len(grid))
    places = dict.fromkeys((int(s), *grid[chosen[k % len(grid)]]) for k, s in enumerate(slices))
    out = []
    for s, top, left in places:
        around = crops.around(s, depth, tools["context"])
        at = np.s_[top : top + sides[0], left : left + sides[1]]
        out.append(np.stack([(panels.unit(one, one["y"][k]) / panels.gain(one, tools, k))[at] for k in around]))
    return out


def card(number, row, one, tools, shown, names):
    """What the page says of one volume, as a dict; shown: how many volumes have such a card."""
    deviation = None
    if tools["deviation"]:
        s = one["x"].shape[0] // 2
        level = tools["deviation"](panels.even(one, tools, s, one["x"][s]))
        level = level * panels.centre(panels.gain(one, tools, s))
        deviation = float(np.sqrt(np.mean(np.square(level))))
    made = panels.pictures(one, deviation, PICTURES // max(shown, 4))
    made |= dict(number=number, title=title(number, row, names))
    made |= dict(sd=f"{deviation * abs(one['scale']):.3g}" if deviation else None, plot=None, estimate=None)
    m = made["measures"] = row["measures"]
    deep = one["y"].shape[0] >= panels.DEEP
    made |= dict(
        untouched=bool(m) and m["removed"] < residual.UNTOUCHED,
        wrong=row["rank"] > 1,
        oriented=deep and bool(one["axes"]),
        unspaced=deep and not one["spacing"],
    )
    unknown = ["there is no noise model: it cannot be told what it was"]
    made["verdict"], *made["also"] = tools["verdict"](m) if m else unknown
    if m and m["removed"] > residual.UNTOUCHED:
        made["plot"] = panels.residual_plot(one, tools)
    if tools["estimate"] and m and m["removed"] > residual.UNTOUCHED and len(one["y"]) > min(tools["context"], 1):
        made["estimate"] = estimated(one, tools, max(3, min(5, 30 // shown)))
    return made


def estimated(one, tools, count):
    """The estimated PSNR of a view, from `count` windows; where noise is stronger, so is the error that is left."""
    found, stronger = tools["estimate"](windows(one, tools, count)), 0.0
    if one["gains"] is not None:
        stronger = 10 * np.log10(np.mean(np.square(one["gains"])))
    return found | dict(psnr=found["psnr"] - stronger, noisy=found["noisy"] - stronger)


def of_run(path, *arguments):
    """`page_of_run`, whose failure is one more problem: the files are written, and the page is not worth them."""
    try:
        return page_of_run(path, *arguments)
    except Exception as error:
        path.unlink(missing_ok=True)  # of another run, which it would be taken for
        return [*arguments[4], f"{path} could not be made: {type(error).__name__}: {error}"]


def page_of_run(path, jobs, rows, tools, facts, problems, names=False):
    """The page of a run over files; rows: of `look`. Returns the problems with what could not be shown added.

    facts: as of `write`, with "sources", "folder" and "out": what was given, the work folder and the folder of files.
    """
    entries, problems = [], list(problems)
    for job in (job for job in jobs if str(job.paths[0]) in rows):
        try:
            found = rows[str(job.paths[0])] or [numbers(one, tools) for one in of_files(job)]
            entries += [(row, job, j) for j, row in enumerate(found)]
        except (ValueError, OSError, MemoryError) as error:
            problems.append(f"report.html lacks {job.paths[0]}: {error}")
    wrong = [row for row, *_ in entries if row["rank"] > 1]
    if wrong:
        worst = tools["verdict"](max(wrong, key=lambda row: row["rank"])["measures"])[0]
        print(f"{len(wrong)} of {len(entries)} volumes look wrong, see {path}; the worst: {worst}", flush=True)
    known = [] if names else known_paths(facts["sources"], jobs, facts["out"])
    seen = {}
    said = [text if names else masked(text, known, seen) for text in dict.fromkeys(problems)]
    last = (None, None)  # the volumes of a file stand together: it is read once

    def load(job, j):
        nonlocal last
        if last[0] is not job:
            last = job, of_files(job)
        return last[1][j]

    write(path, entries, load, tools, facts, said, names)
    return problems


def write(path, entries, load, tools, facts, problems=(), names=False):
    """Writes the page to `path`, whole or not at all.

    entries: [(row, job, number of the volume in it)]; load: of the last two -> view. facts: {"run": [(name, text)],
    "folder": Path with best.json and stages.json, or None}. problems: lines. names: whether to say them.
    """
    from jinja2 import Environment, FileSystemLoader

    order = sorted(range(len(entries)), key=lambda k: (-entries[k][0]["rank"], k))
    shown = order[:SHOWN]
    cards = {k: card(k + 1, entries[k][0], load(*entries[k][1:]), tools, len(shown), names) for k in sorted(shown)}
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    template = template.get_template("report.html")
    while True:
        rest = [k for k in order if k not in shown]
        table = [(k + 1, title(k + 1, entries[k][0], names), entries[k][0]) for k in rest[:ROWS]]
        text = template.render(
            cards=[cards[k] for k in shown],
            table=table,
            unlisted=len(rest) - len(table),
            wrong=sum(row["rank"] > 1 for row, *_ in entries),
            count=len(entries),
            law=panels.law_plot(tools) if tools["deviation"] else None,
            law_words=tools["law"],
            uneven=bool(tools["gains"]),
            verdict=tools["verdict"],
            problems=problems,
            facts=facts["run"],
            stages=stages_of(facts["folder"]) if facts.get("folder") else [],
            candidates=candidates_of(facts["folder"]) if facts.get("folder") else [],
        )
        if len(text.encode()) <= LIMIT or not shown:
            break
        shown = shown[: len(shown) // 2]
    with runtime.atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
