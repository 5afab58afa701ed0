"""The page that a run leaves behind, report.html: before, after, what was removed, how sure, and where not to trust it.

While files are denoised, `look` keeps a row of numbers for each volume and nothing else. At the end `write` reads the
worst volumes again, at most SHOWN, and makes pictures of them; the others are rows of a table. The page is one file of
at most LIMIT bytes, which asks nothing of any other computer, and holds no name unless it is told to.

What it says is handed in, as `tools`, a dict (evaluate.report_tools makes it; a value may be None):

    measure    (y, x), slices (H,W) in [0,1] -> {name: number};  rank  of such measures -> number, above 1 is wrong
    verdict    of such measures -> words
    estimate   [stack (2k+1,h,w)] -> {"psnr", "sd", "noisy"}, dB;  context  k
    residual   (y, x) -> (residual in standard deviations (H,W), where there is noise (H,W))
    spectra    (residual, where) -> (frequencies, power, power of the noise)
    deviation  intensities in [0,1] -> standard deviation of the noise;  correlation  (2r+1,2r+1);  law  words
"""

import base64
import importlib.metadata
import io
import json
import platform
import re
from pathlib import Path

import numpy as np

from lib import crops, files, formats, residual, runtime

LIMIT = 5_000_000  # bytes of the page
SHOWN = 30  # volumes with pictures
ROWS = 5000  # of the table
PICTURES = 1_900_000  # bytes of all pictures, before base64
DEEP = 8  # slices from which on a volume is shown in three planes
KINDS = dict(dicom="DICOM", nifti="NIfTI", hdf5="HDF5", tiff="TIFF", picture="picture", numpy="NumPy")
NOISY, DENOISED = "#3d85c6", "#d97a1f"  # lines of the plots: readable on white and on black
PLANES = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}


# ---------------------------------------------------------------------------------------------------------------
# volumes as they are looked at
# ---------------------------------------------------------------------------------------------------------------
def view(volume, out, kind, mapped=None):
    """What the page needs of a formats.Volume and its denoised slices `out` (S,H,W), as a dict.

    mapped: (scale, offset) if the arrays hold numbers in [0,1], which are the file's own by number * scale + offset.
    """
    scale, offset = mapped or files.scaling(volume, *files.finite_range(volume.slices))
    found = dict(y=volume.slices, x=out, kind=kind, name=f"{volume.source}: {volume.name}", mapped=bool(mapped))
    return found | dict(scale=scale or 1.0, offset=offset, spacing=volume.spacing, axes=volume.axes)


def unit(one, array):
    """Numbers of a view's arrays as float32 in [0,1]; what is not finite is 0."""
    values = np.asarray(array, np.float64)
    values = values if one["mapped"] else (values - one["offset"]) / one["scale"]
    return np.nan_to_num(values.astype(np.float32), nan=0, posinf=1, neginf=0)


def some_slices(count, most):
    """Numbers of at most `most` slices, evenly spaced in the middle two thirds."""
    return np.unique(np.linspace(count / 6, max(count - 1 - count / 6, count / 6), most).round().astype(int))


def centre(image, side=512):
    """The middle of the last two axes, at most `side` pixels each."""
    top, left = ((max(n - side, 0)) // 2 for n in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def numbers(one, tools):
    """A row of the table: {"shape", "kind", "name", "measures", "rank"}; measures are means over three slices."""
    count, found = one["y"].shape[0], []
    for s in some_slices(count, 3) if tools["measure"] else ():
        y, x = (unit(one, centre(one[key][s])) for key in "yx")
        if np.ptp(y):
            found.append(tools["measure"](y, x))
    m = {key: float(np.mean([f[key] for f in found])) for key in found[0]} if found else None
    rank = float(tools["rank"](m)) if m else 0.0
    return dict(shape=tuple(one["y"].shape), kind=one["kind"], name=one["name"], measures=m, rank=rank)


def look(rows, tools, job, volumes=None, arrays=None):
    """Sets rows[job] to the row of each volume that was just denoised; to None if it was there already. Raises nothing.

    rows: dict, by the name of a job's first output file. volumes, arrays: as of formats.read, and denoised.
    """
    rows[str(job.paths[0])] = None
    try:
        views = [view(volume, out, job.item.kind) for volume, out in zip(volumes or (), arrays or ())]
        rows[str(job.paths[0])] = [numbers(one, tools) for one in views] or None
    except Exception:  # a page is not worth a file: `of_run` tries again, and says what is wrong
        return


def of_files(job):
    """The views of a job whose files are written, read again."""
    readable, volumes = files.read(job, [], force=True)
    written = formats.read(readable.item._replace(files=tuple(readable.paths), root=readable.paths[0].parent))
    return [view(volume, out.slices, job.item.kind) for volume, out in zip(volumes, written)]


# ---------------------------------------------------------------------------------------------------------------
# pictures
# ---------------------------------------------------------------------------------------------------------------
def planes(one):
    """[(caption, index into (S,H,W), (letters of rows, columns), (mm of rows, columns))]: what is shown of a view."""
    shape, axes = one["y"].shape, one["axes"] or "???"
    spacing = one["spacing"] or (1.0, 1.0, 1.0)
    out = []
    for axis in range(3 if shape[0] >= DEEP else 1):
        middle = shape[axis] // 2
        rest = [a for a in range(3) if a != axis]
        name = PLANES.get(axes[axis], ("slices as stored", "across the slices, rows", "across the slices, columns")[axis])
        caption = f"{name}, {middle + 1} of {shape[axis]}" if shape[axis] > 1 else "image"
        index = tuple(middle if a == axis else slice(None) for a in range(3))
        out.append((caption, index, tuple(axes[a] for a in rest), tuple(spacing[a] for a in rest)))
    return out


def upright(image, letters, spacing):
    """(image, spacing) turned as radiologists look at it: head or front up, the patient's right on the left."""
    order = ["SI", "AP", "RL"]
    height = [next((k for k, pair in enumerate(order) if letter in pair), 3) for letter in letters]
    if 3 in height:
        return image, spacing
    if height[0] > height[1]:
        image, letters, spacing = image.T, letters[::-1], spacing[::-1]
    image = image[::-1] if letters[0] in "SA" else image
    return (image[:, ::-1] if letters[1] in "RA" else image), spacing


def fitted(image, spacing, side):
    """The float image at the size at which it is shown: square pixels, the longer side `side` pixels or fewer."""
    from PIL import Image

    least = min(spacing)
    size = [n * mm / least for n, mm in zip(image.shape, spacing)]
    factor = min(1.0, side / max(size))
    h, w = (max(1, round(n * factor)) for n in size)
    if (h, w) == image.shape:
        return image
    how = Image.Resampling.BOX if h * w < image.size else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(image, np.float32)).resize((w, h), how))


def encoded(pixels, quality):
    """WebP of uint8 pixels (h,w) or (h,w,3)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "webp", quality=quality, method=4)
    return buffer.getvalue()


def uri(raw):
    return "data:image/webp;base64," + base64.b64encode(raw).decode()


def colours(values, limit):
    """Signed values as uint8 RGB: blue below 0, white at 0, red above."""
    from matplotlib import colormaps

    return (255 * colormaps["RdBu_r"](np.clip(values / limit / 2 + 0.5, 0, 1))[..., :3]).round().astype(np.uint8)


def detail(y, side):
    """(top, left) of the side x side window of an image that varies most once it is smoothed, on a grid of windows."""
    from scipy.ndimage import uniform_filter

    smooth = uniform_filter(y, 5)
    tops, lefts = (range(0, max(n - side, 0) + 1, max(side // 2, 1)) for n in y.shape)
    return max(((t, w) for t in tops for w in lefts), key=lambda at: smooth[at[0] : at[0] + side, at[1] : at[1] + side].std())


def pictures(one, deviation, share):
    """What is shown of a view: dict of `planes`, `window` and the ends of the signed scale, all in the file's numbers.

    deviation: of the noise in [0,1], or None: then of what was removed. share: bytes for the pictures.
    """
    side = int(np.clip((share / 9 / 0.4) ** 0.5, 96, 384))
    shown, at = [], planes(one)
    for caption, index, letters, spacing in at:
        pair = [unit(one, one[key][index]) for key in "yx"]
        (y, mm), (x, _) = (upright(image, letters, spacing) for image in pair)
        small = [fitted(image, mm, side) for image in (y, x)]
        scale = max(small[0].shape) / max(n * s / min(mm) for n, s in zip(y.shape, mm))
        shown.append((f"{caption}{f' (at {100 * scale:.0f} % of its size)' if scale < 0.99 else ''}", *small))
        if len(at) == 1 and scale < 0.7:
            top, left = detail(x, side)
            window = [image[top : top + side, left : left + side] for image in (y, x)]
            shown.append(("detail at full size, where the image varies most", *window))
    low, high = np.percentile(np.concatenate([x.ravel() for _, _, x in shown]), (0.5, 99.7))
    high = high if high > low else low + 1e-6
    removed = np.concatenate([(y - x).ravel() for _, y, x in shown])
    limit = 4 * (deviation or float(removed.std()) or 1e-6)
    sign = np.sign(one["scale"])  # in MONOCHROME1 the higher number is darker

    def grey(image):
        return (255 * np.clip((image - low) / (high - low), 0, 1)).round().astype(np.uint8)

    for quality in (85, 70, 55, 40, 25, 10):
        sets = [
            [encoded(pixels, quality) for pixels in (grey(y), grey(x), colours(sign * (y - x), limit))] for _, y, x in shown
        ]
        if sum(len(raw) for three in sets for raw in three) <= share:
            break
    made = [
        dict(caption=caption, noisy=uri(a), denoised=uri(b), removed=uri(c), width=y.shape[1], height=y.shape[0])
        for (caption, y, _), (a, b, c) in zip(shown, sets)
    ]
    ends = sorted(end * one["scale"] + one["offset"] for end in (low, high))
    return dict(planes=made, window=[f"{end:.4g}" for end in ends], limit=f"{limit * abs(one['scale']):.3g}")


def svg(figure):
    """A matplotlib figure as SVG to stand within a page, with the page's own colour of text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"|\n *', " ", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 sans-serif", text)
    return re.sub(r"#(000000|262626|808080)", "currentColor", text)


def plot(panels, width=6.4, height=2.3):
    """SVG of panels side by side; a panel: dict of title, x, y (labels), lines [(x, y, colour, label)], log; or table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
    for ax, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        ax.set_title(panel["title"], fontsize=9)
        ax.tick_params(labelsize=8)
        if "table" in panel:
            reach = len(panel["table"]) // 2
            ends = (-reach - 0.5, reach + 0.5)
            shown = ax.imshow(panel["table"], cmap="RdBu_r", vmin=-1, vmax=1, extent=(*ends, *ends[::-1]))
            figure.colorbar(shown, ax=ax).ax.tick_params(labelsize=8)
        for x, y, colour, label in panel.get("lines", ()):
            ax.plot(x, y, color=colour, label=label, linewidth=1.6)
        if "lines" in panel:
            ax.set_ylim(0, panel.get("top"))
            ax.spines[["top", "right"]].set_visible(False)
            if len(panel["lines"]) > 1:
                ax.legend(fontsize=8, frameon=False)
        ax.set_xlabel(panel["x"], fontsize=8)
        ax.set_ylabel(panel["y"], fontsize=8)
    return svg(figure)


def residual_plot(one, tools):
    """SVG: histogram and spectrum of what was removed from three slices, beside those of the noise; None if neither."""
    counts, curves = np.zeros(len(residual.EDGES) - 1), []
    for s in some_slices(one["y"].shape[0], 3):
        r, noisy = tools["residual"](*(unit(one, centre(one[key][s])) for key in "yx"))
        counts += np.histogram(np.clip(r[noisy], -4.99, 4.99), residual.EDGES)[0]
        curves.append(tools["spectra"](r, noisy))
    curves = [c for c in curves if len(c[0])]
    if not counts.sum() or not curves:
        return None
    at, step = (residual.EDGES[1:] + residual.EDGES[:-1]) / 2, residual.EDGES[1] - residual.EDGES[0]
    normal = np.exp(-np.square(at) / 2) / np.sqrt(2 * np.pi)
    power, expected = (np.mean([c[k] for c in curves], 0) for k in (1, 2))
    histogram = dict(title="how often", x="removed, in standard deviations of the noise", y="share per unit")
    histogram["lines"] = [(at, normal, NOISY, "noise"), (at, counts / counts.sum() / step, DENOISED, "removed")]
    rings = dict(title="by size of detail (coarse to fine)", x="cycles per pixel", y="power")
    rings["lines"] = [(curves[0][0], expected, NOISY, "noise"), (curves[0][0], power, DENOISED, "removed")]
    return plot([histogram, rings])


def law_plot(tools):
    """SVG: the deviation of the noise at each intensity, and its correlation with the pixels around."""
    x = np.linspace(0, 1, 60)
    level = dict(title="standard deviation of the noise", x="intensity (0 and 1: ends of a volume)", y="share of the range")
    level["lines"] = [(x, tools["deviation"](x), DENOISED, "law")]
    beside = dict(title="correlation with the pixels around", x="pixels", y="pixels", table=tools["correlation"])
    return plot([level, beside], height=2.6)


# ---------------------------------------------------------------------------------------------------------------
# words
# ---------------------------------------------------------------------------------------------------------------
def title(number, row, names):
    """'volume 3 (DICOM, 192 slices of 256x256)', or with the name of the file."""
    count, h, w = row["shape"]
    shape = f"{count} slices of {h}x{w}" if count > 1 else f"image of {h}x{w}"
    return f"volume {number} ({row['kind']}, {shape})" + (f" · {row['name']}" if names else "")


def masked(text, paths):
    """A line of a problem without names: paths become 'file 1', and what libraries quote is cut."""
    for k, path in enumerate(paths, 1):
        if path in text:
            text = text.replace(path, f"[file {k}]")
    text = re.sub(r"(cannot be (?:read|copied)(?: as DICOM)?: \w+).*", r"\1", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "[name]", text)
    return " ".join("[name]" if re.search(r"[/\\^]", word) else word for word in text.split())


def known_paths(sources, jobs, out):
    """All paths that a problem may name, the longest first: what stands in one must not be cut by a shorter one."""
    paths = {str(out)} | {str(p) for job in jobs for p in (*job.item.files, *job.paths, *([job.std] if job.std else []))}
    for source in map(Path, sources):
        paths |= {str(source)} | ({str(p) for p in source.rglob("*")} if source.is_dir() else set())
    return sorted(paths, key=len, reverse=True)


def typed(argv, secrets):
    """The command line as typed; without the values that are names of files and folders, unless `secrets` is empty."""
    hidden = [word if word.startswith("-") and "=" not in word else _hide(word, secrets) for word in argv]
    return " ".join(hidden)


def _hide(word, secrets):
    flag, _, value = word.rpartition("=")
    return (f"{flag}=" if flag else "") + "…" if value in secrets or word in secrets else word


def stages_of(folder):
    """[(stage, seconds)] of stages.json in a folder, if there is one."""
    path = folder / "stages.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    return [(name, f"{one['seconds']:g} s") for name, one in done.items() if isinstance(one, dict) and one.get("seconds")]


def candidates_of(folder):
    """[(candidate, estimated PSNR, whether it is the best)] of best.json in a folder, if there is one."""
    path = folder / "best.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    best = max(found, key=lambda name: found[name]["psnr"], default=None)
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
def windows(one, context, count):
    """`count` stacks (2 context + 1, h, w) in [0,1] from all over a view, for the estimate: at most 192 pixels wide."""
    (depth, *size), rng = one["y"].shape, runtime.step_rng(0)
    sides = [min(n, 192, max(64, n // 2)) for n in size]
    slices = np.linspace(0, depth - 1, count + 2)[1:-1].round().astype(int) if depth > 1 else [0] * count
    out = []
    for s in slices:
        top, left = (int(rng.integers(n - side + 1)) for n, side in zip(size, sides))
        which = crops.around(int(s), depth, context)
        cut = [one["y"][k][top : top + sides[0], left : left + sides[1]] for k in which]
        out.append(unit(one, np.stack(cut)))
    return out


def card(number, row, one, tools, shown, names):
    """What the page says of one volume, as a dict; shown: how many volumes have such a card."""
    deviation = None
    if tools["deviation"]:
        level = tools["deviation"](unit(one, centre(one["x"][one["x"].shape[0] // 2])))
        deviation = float(np.sqrt(np.mean(np.square(level))))
    made = pictures(one, deviation, PICTURES // max(shown, 4)) | dict(number=number, title=title(number, row, names))
    made |= dict(sd=f"{deviation * abs(one['scale']):.3g}" if deviation else None, plot=None, estimate=None)
    m = made["measures"] = row["measures"]
    made["wrong"] = row["rank"] > 1
    made["verdict"] = tools["verdict"](m) if m else "there is no noise model: whether it was noise cannot be told"
    if m:
        made["plot"] = residual_plot(one, tools)
    if tools["estimate"] and one["y"].shape[0] > tools["context"] // 2:
        made["estimate"] = tools["estimate"](windows(one, tools["context"], max(3, min(8, 48 // shown))))
    return made


def of_run(path, jobs, rows, tools, facts, problems, names=False):
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
    known = [] if names else known_paths(facts["sources"], jobs, facts["out"])
    said = [text if names else masked(text, known) for text in dict.fromkeys(problems)]
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
            law=law_plot(tools) if tools["deviation"] else None,
            law_words=tools["law"],
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
