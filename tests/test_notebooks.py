"""The notebooks' runner on notebooks of two cells, and the committed notebooks as they stand."""

import shutil
import sys

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import run as notebooks


@pytest.fixture
def folder(tmp_path):
    """notebooks/ with a notebook that is good: it says which n it was run with, in a file and in its output."""
    (tmp_path / "notebooks").mkdir()
    make(tmp_path / "notebooks" / "good.ipynb", "print('n is', n)\nopen('../seen', 'w').write(f'{n}')\nassert n > 0")
    return tmp_path / "notebooks"


def make(path, code):
    cells = [
        nbformat.v4.new_markdown_cell("# A notebook"),
        nbformat.v4.new_code_cell("n = 2  # anything", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "name": "python3"}, "short": {"n": 7}}
    nbformat.write(notebook, path)


def said(capsys, folder, *flags):
    """(exit code, lines printed) of run.py."""
    code = notebooks.main([*flags], folder)
    return code, capsys.readouterr().out.splitlines()


def edited(path, change):
    """Applies a change to the notebook in a file."""
    notebook = nbformat.read(path, 4)
    change(notebook)
    nbformat.write(notebook, path)


def test_full_run_is_kept_and_any_edit_shows(folder, capsys):
    good = folder / "good.ipynb"
    assert said(capsys, folder, "--check")[0] == 1  # never executed
    assert said(capsys, folder)[0] == 0 and (folder / "../seen").read_text() == "2"
    notebook = nbformat.read(good, 4)
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert notebook.cells[2].outputs[0].text == "n is 2\n" and notebook.cells[2].metadata == {}
    assert notebook.metadata.seconds >= 0 and notebook.metadata.short == {"n": 7}
    assert said(capsys, folder, "--check") == (0, ["1 notebooks, nothing wrong"])
    edits = {
        "cell": lambda n: n.cells[2].update(source=n.cells[2].source + " "),
        "prose": lambda n: n.cells[0].update(source="# Another"),
        "output": lambda n: n.cells[2].outputs[0].update(text="n is 3\n"),
        "outputs": lambda n: n.cells[2].update(outputs=[]),
        "tag": lambda n: n.cells[2].metadata.update(tags=["parameters"]),
        "short": lambda n: n.metadata.short.update(n=8),
        "order": lambda n: n.cells.reverse(),
    }
    shutil.copy(good, folder / "before")
    for name, change in edits.items():
        shutil.copy(folder / "before", good)
        edited(good, change)
        code, lines = said(capsys, folder, "--check")
        assert code == 1 and any("good: stale" in line for line in lines), name


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda n: n.metadata.short.update(m=1), "short value 'm' is not assigned"),
        (lambda n: n.metadata.kernelspec.update(name="conda-env"), "kernel is not python3"),
        (lambda n: n.cells[1].metadata.clear(), "0 cells are tagged"),
        (lambda n: n.cells[2].update(execution_count=5), "not executed from first to last"),
        (lambda n: n.cells[2].update(outputs=[nbformat.v4.new_output("error", ename="A")]), "shows an error"),
        (lambda n: n.cells[2].update(outputs=[nbformat.v4.new_output("stream", text="x" * 450_000)]), "bytes, more"),
        (lambda n: n.cells[2].update(source="n\n" * 26), "code cell 2 has 26 lines, more than 25"),
    ],
)
def test_check_finds(folder, capsys, change, says):
    """Faults that are there although the hash is right."""

    def run(notebook):
        for number, cell in enumerate(notebook.cells[1:], 1):
            cell.update(execution_count=number, outputs=[nbformat.v4.new_output("stream", text="2")])
        change(notebook)
        notebook.metadata["source_sha256"] = notebooks.digest(notebook)

    edited(folder / "good.ipynb", run)
    code, lines = said(capsys, folder, "--check")
    assert code == 1 and len(lines) == 1 and says in lines[0]


def test_short_run_takes_the_short_values_and_writes_nothing(folder, capsys):
    (folder / "helper.py").write_text("value = 1\n")
    (folder / "work").mkdir()
    make(folder / "imports.ipynb", "import os, helper\nassert n == 7 and helper.value and not os.path.exists('work')")
    before = {path: path.read_bytes() for path in folder.glob("*.ipynb")}
    code, lines = said(capsys, folder, "--short", "--jobs", "2")
    assert code == 0 and [line.split(":")[0] for line in lines] == ["good", "imports"]
    assert (folder / "../seen").read_text() == "7"
    assert {path: path.read_bytes() for path in folder.glob("*.ipynb")} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["notebooks", "seen"]  # the copy is gone


def test_a_claim_that_does_not_hold_is_a_line_and_the_others_still_run(folder, capsys):
    make(folder / "a.ipynb", "assert n == 3, 'n is not three'")
    make(folder / "b.ipynb", "1 / 0")
    make(folder / "c.ipynb", "import os\nos._exit(3)")
    before = {name: (folder / f"{name}.ipynb").read_bytes() for name in "abc"}
    code, lines = said(capsys, folder, "--jobs", "2")
    assert code == 1 and lines[0] == "a: code cell 2: AssertionError: n is not three"
    assert lines[1] == "b: code cell 2: ZeroDivisionError: division by zero"
    assert lines[2].startswith("c: code cell 2: DeadKernelError") and lines[3].startswith("good: ")
    assert before == {name: (folder / f"{name}.ipynb").read_bytes() for name in "abc"}
    assert said(capsys, folder, "--short", "a")[0] == 1  # in a short run as well


def test_claims_of_a_full_training_bind_full_runs_alone(folder, capsys):
    make(folder / "good.ipynb", "assert n == 2, 'too little training'")

    def tag(notebook):
        notebook.cells[2].metadata["tags"] = ["claims"]

    assert said(capsys, folder, "--short")[0] == 1
    edited(folder / "good.ipynb", tag)
    assert said(capsys, folder, "--short")[0] == 0 == said(capsys, folder)[0]  # n is 7, then 2
    for code in ("assert n == 7", "1 / (n - 7)"):
        make(folder / "good.ipynb", code)
        edited(folder / "good.ipynb", tag)
        assert said(capsys, folder, *(["--short"] if "/" in code else []))[0] == 1


def test_wrong_names(folder):
    with pytest.raises(ValueError, match="does not exist"):
        notebooks.main(["missing"], folder)


def test_committed_notebooks(capsys):
    """What stands in notebooks/ is what its cells computed."""
    code, lines = said(capsys, ROOT / "notebooks", "--check")
    assert code == 0, lines
