"""report.html: what it says and shows, what it must not say, that a browser shows it; the verdict over known cases."""

import json
import re
import shutil
import subprocess
import time
import urllib.request

import nibabel
import numpy as np
import pytest
from conftest import ROOT, SMALL, make_dataset, ok, run
from scipy.ndimage import gaussian_filter
from test_formats import dicom
from test_measure import phantom

import evaluate
import noise
from lib import formats, panels, report, residual

LEVEL = 10 / 255


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """{"told": a student that knows its noise, "silent": one without a noise model}: paths."""
    folder = tmp_path_factory.mktemp("students")
    make_dataset(folder / "x.h5")
    told = ["--target", "recorrupted", "--noise", "gaussian:10/255", "--init", ROOT / "weights/images.pt"]
    told += ["--steps", 0, "--ensemble", 1, "--crop", 32]
    silent = [
        "--target",
        "clean",
        *SMALL,
        "--arch",
        "resunet",
        "--enc-blocks",
        1,
        "--middle-blocks",
        1,
        "--dec-blocks",
        1,
    ]
    for name, flags in (("told", told), ("silent", silent)):
        ok("distill", "--data", "x.h5", *flags, "--model", f"{name}.pt", "--out", f"{name}.h5", cwd=folder)
    return {name: folder / f"{name}.pt" for name in ("told", "silent")}


def noisy(count, side=96, level=LEVEL, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([noise.add(x, "gaussian", level, 0, rng) for x in phantom(count, side)])


@pytest.fixture(scope="module")
def mixed(students, tmp_path_factory):
    """A folder with a DICOM series, a 4D NIfTI file, an image and a damaged file; denoised, without and with names."""
    folder = tmp_path_factory.mktemp("mixed")
    source = folder / "roe_scans"
    (source / "deep").mkdir(parents=True)
    for s, y in enumerate(noisy(9)):
        dicom(source / f"{s}roe.dcm", np.clip(3000 * y + 300, 0, 4095).astype(np.uint16), s)
    repeats = np.stack([noisy(8, 64, seed=k).T for k in (1, 2)], -1)
    nibabel.save(
        nibabel.Nifti1Image((1000 * repeats).astype(np.int16), np.diag([2, 2, 4, 1])), source / "roe_4d.nii.gz"
    )
    np.save(source / "deep" / "roe one.npy", noisy(1)[0])
    (source / "roe bad.npy").write_bytes((source / "deep" / "roe one.npy").read_bytes()[:5000])
    for out, flags in (("masked_roe", []), ("named", ["--with-names"])):
        done = run("denoise", source.name, "--out", out, "--model", students["told"], *flags, cwd=folder)
        assert done.returncode == 1 and "1 left out" in done.stdout, done.stderr
    return folder


def test_page(mixed):
    """Every volume with its numbers and pictures, what was left out, the noise, the run; nothing from outside."""
    page = (mixed / "masked_roe/report.html").read_text()
    assert len(page) < report.LIMIT and page.count("<article") == 4
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']+|url\((?!#)[^)]*|https?://|@import""", page)
    assert not outside
    for text in ("(DICOM, 9 slices of 96x96)", "(NIfTI, 8 slices of 64x64)", "(NumPy, image of 96x96)"):
        assert text in page
    assert page.count("slices of 64x64)</h3>") == 2 and "axial, 5 of 8" in page and "coronal, 33 of 64" in page
    assert len(re.findall(r"Estimated PSNR [\d.]+ dB before, <strong>[\d.]+", page)) == 4
    assert "[file 1]" in page and "Left out, and why" in page and "gaussian: variance" in page and "Python 3" in page
    assert page.count('<img src="data:image/webp') == 3 * (3 + 3 + 3 + 1)


def test_what_looks_wrong_is_said_at_once(tmp_path, students):
    """One hot pixel sets the range, and the student takes the rest for flat; without it nothing is said."""
    image = noisy(1)[0]
    for name in ("good", "hot"):
        np.save(tmp_path / f"{name}.npy", image)
        said = ok("denoise", f"{name}.npy", "--out", name, "--model", students["told"], cwd=tmp_path).stdout
        assert ("1 of 1 volumes look wrong, see hot/report.html" in said) == (name == "hot")
        assert ("look wrong" in said) == (name == "hot")
        image[0, 0] = 30


def test_names_are_said_only_if_asked_for(mixed):
    page = (mixed / "masked_roe/report.html").read_text()
    named = (mixed / "named/report.html").read_text()
    assert not re.search(r"roe|doe\^|jane|deep", re.sub('base64,[^"]*', "", page), re.I) and str(mixed) not in page
    assert "denoise.py … --out … --model …" in page and "--with-names" in named
    for text in ("roe bad.npy", "deep/roe one.npy", "roe_4d_t001", "roe_scans"):
        assert text in named


def test_what_libraries_say_is_cut():
    said = "in/a b.dcm cannot be read: KeyError 'Doe^Jane'"
    seen = {}
    assert report.masked(said, ["in/a b.dcm", "in"], seen) == "[file 1] cannot be read: KeyError"
    assert report.masked("in: two in in/b", ["in"], seen) == "[file 2]: two in [file 2]"
    assert report.masked("x: tag 'Doe Jane' of other/place Doe^J", [], seen) == "x: tag [name] of [name] [name]"


def test_scales(mixed):
    """Window and signed scale in the numbers of the file: 4 standard deviations of Gaussian noise, told exactly."""
    page = (mixed / "named/report.html").read_text()
    card = next(c for c in page.split("<article")[1:] if "roe one.npy" in c)
    y = np.load(mixed / "roe_scans/deep/roe one.npy")
    limit = float(re.search(r"<span>\+([\d.e-]+)</span>", card)[1])
    assert limit == pytest.approx(4 * LEVEL * np.ptp(y), rel=0.01)
    low, high = map(float, re.search(r"Grey from (\S+) to (\S+) in", card).groups())
    assert y.min() < low < 0.1 and 0.7 < high < y.max()


def test_the_worst_come_first_and_the_rest_in_a_table(students, tmp_path):
    """40 images: 30 with pictures, one of them without its noise and first; again, nothing is done; without it, all."""
    (tmp_path / "in").mkdir()
    for k in range(40):
        np.save(tmp_path / "in" / f"{k:02d}.npy", noisy(1, 48, LEVEL * (0.2 if k == 33 else 1), seed=k)[0])
    flags = ["in", "--out", "out", "--model", students["told"]]
    ok("denoise", *flags, cwd=tmp_path)
    path = tmp_path / "out/report.html"
    page = path.read_text()
    assert page.count("<article") == 30 and page.count("image of 48x48)</td>") == 10
    assert re.search(r"<h3>volume (\d+)", page)[1] == "34" and page.index("too high") < page.index("</article>")
    before = path.read_bytes()
    ok("denoise", *flags, cwd=tmp_path)
    assert path.read_bytes() == before
    path.unlink()
    ok("denoise", *flags, cwd=tmp_path)  # every file stands: they are read again
    numbers = re.compile(r"<h3>(volume \d+)|<td>(volume \d+)|removed ([\d.]+) · ")
    assert numbers.findall(path.read_text()) == numbers.findall(page)


def test_student_without_noise_model(students, tmp_path):
    np.save(tmp_path / "a.npy", noisy(1)[0])
    ok("denoise", "a.npy", "--out", "out", "--model", students["silent"], cwd=tmp_path)
    page = (tmp_path / "out/report.html").read_text()
    assert "No noise model" in page and "it cannot be told what it was" in page and page.count("data:image/webp") == 3
    assert "Estimated PSNR" not in page and "σ of what was removed" in page


def test_a_page_that_fails_costs_no_file(students, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", noisy(1)[0])
    monkeypatch.setattr(report, "card", lambda *a: 1 / 0)
    done = run("denoise", "a.npy", "--out", "out", "--model", students["told"], cwd=tmp_path)
    assert done.returncode == 1 and "report.html could not be made: ZeroDivisionError" in done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.npy", "diffdenoise"}


def test_thirty_noisy_volumes_fit(tmp_path):
    """White noise, which no format compresses, in 31 volumes of 3 planes of 400x400 pixels."""
    y = np.random.default_rng(0).random((9, 400, 400), np.float32)
    one = report.view(formats.Volume("v", y, "s"), y[::-1], "numpy")
    tools = evaluate.report_tools(None)
    entries = [(report.numbers(one, tools), None, 0)] * 31
    report.write(tmp_path / "r.html", entries, lambda *_: one, tools, dict(run=[]))
    page = (tmp_path / "r.html").read_text()
    assert page.count("<article") == 30 and 1e6 < len(page) < report.LIMIT


def test_upright():
    """However a plane is stored, the head, or the front, is up, and the patient's right is on the left."""
    head = np.arange(6.0).reshape(2, 3)  # rows from superior to inferior, columns from right to left
    for rows, columns in (("I", "L"), ("S", "L"), ("I", "R"), ("S", "R")):
        stored = head[:: 1 if rows == "I" else -1, :: 1 if columns == "L" else -1]
        assert np.array_equal(panels.upright(stored, (rows, columns), (2, 1))[0], head)
        turned, spacing = panels.upright(stored.T, (columns, rows), (1, 2))
        assert np.array_equal(turned, head) and spacing == (2, 1)
    assert panels.upright(head, ("?", "?"), (2, 1))[0] is head


def test_evaluate(tmp_path):
    make_dataset(tmp_path / "x.h5")
    flags = ["--no-reference", "--data", "x.h5", "--noise", "gaussian:6/255", "--split", "all"]
    shutil.copy(tmp_path / "x.h5", tmp_path / "y.h5")
    ok("experiments.baselines", "--data", "x.h5", "--sigma", "6/255", "--out", "nlm.h5", cwd=tmp_path)
    ok("evaluate", *flags, "--pred", "nlm.h5", "--report", "r.html", cwd=tmp_path)
    page = (tmp_path / "r.html").read_text()
    assert page.count("<article") == 2 and "(dataset, 3 slices of 48x40)" in page and "nlm" not in page
    refused = run("evaluate", *flags, "--pred", "a=nlm.h5", "b=nlm.h5", "--report", "r.html", cwd=tmp_path)
    assert refused.returncode == 2 and "one file of --pred, not 2" in refused.stderr


@pytest.mark.parametrize("level", [6 / 255, 16 / 255])
def test_verdict(level):
    """Well; too much removed; too little; a law of the wrong level, both ways; each is told from the others."""
    law, x = noise.known("gaussian", level), gaussian_filter(phantom(1, 192)[0], 1)
    y = noise.add(x, "gaussian", level, 0, np.random.default_rng(0))
    low, high = ({**law, "variance": [k**2 * level**2, 0, 0]} for k in (0.6, 1.5))
    cases = {
        "noise and nothing else": (x, law),
        "fine detail is lost": (gaussian_filter(x, 3), law),
        "noise is left": ((x + y) / 2, law),
        "noise model is too low": (x, low),
        "noise model is too high": (x, high),
        "nothing was removed": (y, law),
    }
    for text, (out, model) in cases.items():
        said = residual.said(evaluate.no_reference(y, out, model))
        assert any(text in words for words in said), (text, said)
        assert not any(other in words for words in said for other in cases.keys() - {text}), (text, said)


# ---------------------------------------------------------------------------------------------------------------
# in a browser
# ---------------------------------------------------------------------------------------------------------------
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browser(tmp_path):
    """call(method, **parameters) of Chrome's protocol, on one tab; said, asked: the page's complaints and requests."""
    websocket = pytest.importorskip("websocket")  # jupyterlab brings it
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    flags = "--headless --no-sandbox --disable-gpu --remote-debugging-port=0 --remote-allow-origins=*".split()
    process = subprocess.Popen([CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'browser'}"], stderr=subprocess.DEVNULL)
    port_file, deadline = tmp_path / "browser/DevToolsActivePort", time.monotonic() + 60
    while not (port_file.exists() and port_file.read_text().strip()):
        assert process.poll() is None and time.monotonic() < deadline, "the browser did not start"
        time.sleep(0.1)
    port = port_file.read_text().split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
        tab = next(t for t in json.load(answer) if t["type"] == "page")
    socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=30)

    def call(method, **parameters):
        socket.send(json.dumps(dict(id=1, method=method, params=parameters)))
        while "id" not in (message := json.loads(socket.recv())):
            if message["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                call.said.append(message)
            call.asked += (
                [message["params"]["request"]["url"]] if message["method"] == "Network.requestWillBeSent" else []
            )
        assert "error" not in message, message
        return message["result"]

    call.said, call.asked = [], []
    yield call
    socket.close()
    process.terminate()
    process.wait(20)


def test_in_a_browser(mixed, browser):
    """No complaint, no request, pictures of their size, text in both themes; the slider moves by keys, and wipes."""

    def value(expression):
        return browser("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    for domain in ("Page", "Runtime", "Log", "Network"):
        browser(f"{domain}.enable")
    browser("Page.navigate", url=(mixed / "masked_roe/report.html").as_uri())
    deadline = time.monotonic() + 30
    while value("document.readyState + [...document.images].every(i => i.complete)") != "completetrue":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    sizes = value("[...document.images].map(i => [i.naturalWidth, i.clientWidth, i.naturalHeight / i.naturalWidth])")
    assert len(sizes) == 40 and all(natural > 15 and shown > 15 for natural, shown, _ in sizes)
    assert value("document.documentElement.scrollWidth <= innerWidth")  # nothing is cut off
    assert "What was done to the images" in value("document.body.innerText")
    clip = "getComputedStyle(document.querySelector('.over')).clipPath"
    assert "100%" in value(clip)
    value("document.querySelector('input[type=range]').focus()")
    for kind in ("keyDown", "keyUp") * 3:
        browser("Input.dispatchKeyEvent", type=kind, key="PageUp", code="PageUp", windowsVirtualKeyCode=33)
    moved = int(value("document.querySelector('input[type=range]').value"))
    assert moved > 10 and (f"{100 - moved}%" in value(clip) or f"calc(100% - {moved}%)" in value(clip))
    paper = {}
    for theme in ("light", "dark"):
        browser("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=theme)])
        style = "getComputedStyle(document.querySelector('{}')).{}"
        colours = [value(style.format(*what)) for what in (("body", "backgroundColor"), ("svg text", "fill"))]
        paper[theme] = [np.mean([int(n) for n in re.findall(r"\d+", c)[:3]]) for c in colours]
    assert paper["light"][0] > 200 > 80 > paper["light"][1] and paper["dark"][0] < 80 < 200 < paper["dark"][1]
    browser("Emulation.setEmulatedMedia", media="print")
    assert value("getComputedStyle(document.querySelector('.wipe')).display") == "none"
    assert not browser.said
    assert not [url for url in browser.asked if not url.startswith(("file:", "data:", "chrome:"))]
