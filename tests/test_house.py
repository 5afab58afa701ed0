"""The house: what may import what, how large a room may be, what is loaded when."""

import ast
import bisect
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = ("lib", "", "experiments")  # from below: each may import from its own floor and those below it
ROOMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for floor in FLOORS
    for path in sorted((ROOT / floor).glob("*.py" if floor == "" else "**/*.py"))
}


def imports(room):
    """The rooms that a room imports, at its head or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(ROOMS[room].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in ROOMS and name not in ("lib", "experiments", room)}


ARROWS = {room: imports(room) for room in ROOMS}


def floor(room):
    return FLOORS.index(room.split(".")[0] if "." in room or room in FLOORS else "")


def test_no_arrow_goes_upwards():
    assert len(ROOMS) > 25 and "noise" in ARROWS["measure"] and "lib.formats.dicom" in ARROWS["lib.formats"]
    up = [(room, other) for room, others in ARROWS.items() for other in others if floor(other) > floor(room)]
    assert not up


def test_no_circles():
    """Taking away, again and again, the rooms that import nothing that is left must leave no room."""
    left = dict(ARROWS)
    while left:
        free = [room for room, others in left.items() if not others & left.keys()]
        assert free, f"circle among {sorted(left)}"
        left = {room: others for room, others in left.items() if room not in free}


def test_few_scripts_and_arrows():
    """Ten at the door; at most 80 arrows among what people use, root and lib, with lib/formats as one room."""
    assert len([room for room in ROOMS if floor(room) == 1]) == 10

    def outer(room):
        return "lib.formats" if room.startswith("lib.formats") else room

    arrows = {(outer(room), outer(other)) for room in ROOMS if floor(room) < 2 for other in ARROWS[room]}
    assert len({(a, b) for a, b in arrows if a != b}) <= 81


def test_no_room_is_too_large():
    for folder in ("", "lib", "lib/formats", "experiments", "notebooks", "tests"):
        for path in (ROOT / folder).glob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path


@pytest.mark.parametrize("stage", ["bsn", "diffusion", "distill", "experiments.baselines"])
def test_training_can_be_seen_at_a_glance(stage):
    (train,) = [n for n in ast.parse(ROOMS[stage].read_text()).body if getattr(n, "name", "") == "train"]
    assert train.end_lineno - train.lineno < 45


def test_a_stage_loads_no_reader_of_image_files():
    code = "import sys, bsn, diffusion, srds, distill; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"pydicom", "nibabel", "nilearn", "tifffile", "imagecodecs", "PIL", "skimage", "matplotlib"}
    assert "h5py" in loaded and not heavy & set(loaded.split())


def test_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 8192


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_numbers_stand_in_results(page):
    """Two decimals stand in a file of results/ that their section names; below 1 they may be a difference."""
    text, missing, seen = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL), [], 0
    for section in re.split(r"\n(?=## )", text):
        named = [
            ((ROOT / page).parent / link).resolve() for link in re.findall(r"\]\(([^)#]*results[^)#]*)\)", section)
        ]
        inside = [path for name in named for path in ([name] if name.is_file() else name.rglob("*"))]
        inside = [path.read_text() for path in inside if path.suffix in (".md", ".json")]
        words = {number for raw in inside for number in re.findall(r"\d+\.\d+", raw)}
        exact = sorted(float(number) for raw in inside for number in re.findall(r"\d+\.\d{3,}", raw))
        for number in re.findall(r"(?<![\w.])\d+\.\d\d(?!\d)", section):
            k, seen = bisect.bisect_left(exact, float(number) - 0.00501), seen + 1
            rounded = k < len(exact) and exact[k] < float(number) + 0.00501
            if number not in words and not rounded and float(number) >= 1:
                missing.append((section.splitlines()[0], number))
    assert seen > 15 and not missing
