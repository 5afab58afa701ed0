"""Runs the notebooks, and checks that what they show is what their cells compute.

    In    notebooks/NN_name.ipynb   one cell tagged `parameters`; metadata.short {name: value}: what a short run takes
    Out   the same file with its outputs; metadata.seconds, how long it took; metadata.source_sha256, a hash of the
          cells, the short values and the outputs

    python notebooks/run.py                         # all, in full; each that ran without error is rewritten
    python notebooks/run.py 02_why_it_works         # this one
    python notebooks/run.py --short --jobs 2        # with the short values and in a copy: nothing is written
    python notebooks/run.py --check                 # nothing runs; tells what is stale, too long or wrong

A cell that raises, and so a claim that does not hold, is one line with the notebook, the number of the code cell and
the error; the other notebooks still run; exit code 1. So is every fault that --check finds. Short values are assigned
in a cell of their own below the one tagged `parameters`, as papermill does it. What a network can only do after its
full training is asserted in cells tagged `claims`: a short run goes on when such an assertion fails.
"""

import ast
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the scripts stand one folder up
from lib import runtime

BYTES = 450_000  # of a notebook, at most
LINES = 25  # of a code cell, at most
SECONDS = 1800  # of a cell, at most


def parameters(notebook):
    """The position of the cell tagged `parameters`. Raises ValueError unless there is exactly one."""
    tagged = [k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{len(tagged)} cells are tagged `parameters`: there must be one")
    return tagged[0]


def assigned(source):
    """The names that lines such as `steps = 100` give values to."""
    targets = [target for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def digest(notebook):
    """Hash of all that a reader sees (cells and outputs), the tags and the short values."""
    cells = [
        [cell.cell_type, cell.source, cell.metadata.get("tags", []), cell.get("outputs", [])] for cell in notebook.cells
    ]
    return hashlib.sha256(json.dumps([cells, notebook.metadata.get("short")], sort_keys=True).encode()).hexdigest()


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def execute(path, short, folder, threads):
    """Runs a notebook with the working directory `folder`. Returns (it with its outputs, seconds, error or None)."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if short:
        values = "\n".join(f"{name} = {value!r}" for name, value in notebook.metadata.get("short", {}).items())
        notebook.cells.insert(parameters(notebook) + 1, nbformat.v4.new_code_cell(values))
    options = dict(kernel_name="python3", timeout=SECONDS, record_timing=False, coalesce_streams=True)
    options |= dict(extra_arguments=["--log-level=40"])  # a kernel's errors, not its warnings
    options |= dict(allow_error_names=["AssertionError"] if short else [])  # those outside `claims` are found below
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options)
    begun, began, error = [], time.monotonic(), None
    client.on_cell_execute = lambda cell, cell_index: begun.append(cell_index)
    try:
        client.execute(env={"OMP_NUM_THREADS": str(threads), **os.environ})
    except CellExecutionError as raised:
        error = " ".join(f"{raised.ename}: {raised.evalue}".split())
    except Exception as raised:  # the kernel died, or a cell took too long
        error = one_line(raised)
    if error:  # the cell that failed is the last that was begun; that of the short values does not count
        error = f"code cell {max(1, len(begun) - short)}: {error}"
    for number, cell in enumerate(code, 1):
        if not error and "claims" not in cell.metadata.get("tags", []):
            failed = [e for e in cell.outputs if e.output_type == "error"]
            error = f"code cell {number}: AssertionError: {failed[0].evalue}" if failed else None
    return notebook, time.monotonic() - began, error


def write(path, notebook, seconds):
    """Writes an executed notebook: nothing in it that changes from run to run but the outputs and `seconds`."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    kept = {key: notebook.metadata[key] for key in ("kernelspec", "short") if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict({**kept, "language_info": {"name": "python"}, "seconds": round(seconds)})
    notebook = nbformat.reads(nbformat.writes(notebook), 4)
    notebook.metadata["source_sha256"] = digest(notebook)
    with runtime.atomic_write(path) as temporary:
        temporary.write_text(nbformat.writes(notebook) + "\n")


def faults(path):
    """What is wrong with a notebook as it stands, a line each."""
    try:
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds
        return [f"cannot be read: {one_line(error)}"]
    meta, found = notebook.metadata, []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    if meta.get("source_sha256") != digest(notebook):
        found.append("stale: its cells or outputs are not those of its last full run")
    if not outputs:
        found.append("has no outputs")
    if any(output.output_type == "error" for output in outputs):
        found.append("shows an error")
    if f"{path.resolve().parent.parent}/" in json.dumps(outputs):
        found.append("an output names a folder of this machine")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not executed from first to last: execution counts are not 1 to n")
    if path.stat().st_size > BYTES:
        found.append(f"{path.stat().st_size:,} bytes, more than {BYTES:,}")
    lengths = [len(cell.source.splitlines()) for cell in code]
    found += [f"code cell {k} has {n} lines, more than {LINES}" for k, n in enumerate(lengths, 1) if n > LINES]
    if meta.get("kernelspec", {}).get("name") != "python3":
        found.append("its kernel is not python3")
    try:
        unknown = set(meta.get("short", {})) - assigned(notebook.cells[parameters(notebook)].source)
        found += [f"short value {name!r} is not assigned in the parameters cell" for name in sorted(unknown)]
    except (ValueError, SyntaxError) as error:
        found.append(str(error))
    return found


def run_all(paths, short, jobs):
    """Executes notebooks, `jobs` at a time, and prints a line for each. Returns how many failed."""
    folder, threads, failed = paths[0].parent, max(1, (os.cpu_count() or 1) // jobs), 0

    def one(path):
        try:
            notebook, seconds, error = execute(path, short, copy if short else folder, threads)
        except Exception as raised:  # no notebook at all
            return path.stem, one_line(raised), True
        if not (short or error):
            write(path, notebook, seconds)
        return path.stem, error or f"{seconds:.0f} s", bool(error)

    with tempfile.TemporaryDirectory(prefix=".notebooks-", dir=folder.parent) as copy:
        if short:
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("work", ".*"), dirs_exist_ok=True)
        try:
            for name, said, bad in ThreadPoolExecutor(jobs).map(one, paths):
                print(f"{name}: {said}", flush=True)
                failed += bad
        except KeyboardInterrupt:  # threads would go on; kernels end with this process
            shutil.rmtree(copy, ignore_errors=True)
            os._exit(130)
    return failed


def main(argv=None, folder=HERE):
    p = runtime.parser(__doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help="notebooks (default all)")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--short", action="store_true", help="with the short values, in a copy; writes nothing")
    mode.add_argument("--check", action="store_true", help="runs nothing; tells what is stale, too long or wrong")
    p.add_argument("--jobs", type=runtime.positive, default=1, help="notebooks at a time; they share the cores")
    args = p.parse_args(argv)
    paths = [folder / f"{Path(name).stem}.ipynb" for name in args.names] or sorted(folder.glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
    if not paths:
        raise ValueError(f"{folder} holds no notebooks")
    if not args.check:
        return 1 if run_all(paths, args.short, args.jobs) else 0
    found = [f"{path.stem}: {fault}" for path in paths for fault in faults(path)]
    print("\n".join(found) or f"{len(paths)} notebooks, nothing wrong")
    return 1 if found else 0


if __name__ == "__main__":
    runtime.command(main)
