"""A run over many files, in one process or several: its log, its lock, its share of the files, its end.

The log has two lines of JSON for each job, one from before its files are written and one from after. Lines are only
ever added, so that the cost of a job does not grow with their number, and a run that is killed within a line loses that
line alone. Each share of the files has a log of its own; whoever starts reads them all.
"""

import contextlib
import json
import os
import re
import sys
import time

import torch.distributed as dist

from lib import runtime

try:
    import fcntl
except ImportError:  # Windows: there is no lock
    fcntl = None


# ---------------------------------------------------------------------------------------------------------------
# log
# ---------------------------------------------------------------------------------------------------------------
def read(folder):
    """{name of a job: its last state} of all logs in a folder; a torn line counts as not written."""
    found = {}
    for path in sorted(folder.glob("files*.jsonl")):
        with open(path, "rb") as file:
            for line in file:
                try:
                    state = json.loads(line)
                    name, turn = state.pop("name"), state["turn"]
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                if turn >= found.get(name, state)["turn"]:
                    found[name] = state
    return found


def add(folder, share, done, name, mark, whole):
    """Sets the state of a job, {mark, whole, turn}, in `done` and in the log of this share.

    mark: the input and the denoiser. whole: whether all of its files are written. turn: how many lines the job has had,
    which tells the latest in several logs without a clock. Raises OSError if the disk is full.
    """
    state = dict(mark=mark, whole=whole, turn=done.get(name, {"turn": 0})["turn"] + 1)
    with open(folder / f"files{suffix(share)}.jsonl", "ab+") as file:
        torn = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps({"name": name, **state}).encode() + b"\n")
    done[name] = state


# ---------------------------------------------------------------------------------------------------------------
# shares
# ---------------------------------------------------------------------------------------------------------------
def share_of(text, model):
    """(k, n): this process takes every n-th job from the k-th on. text: "K/N", K from 1 to N, or None for all.

    The processes of torchrun share that share. Raises ValueError for any other text, or without a trained model.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text or "1/1")
    k, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= k <= n:
        raise ValueError(f"--share {text}: give K/N, the share K from 1 to N, such as 2/4")
    several = n * int(os.environ.get("WORLD_SIZE", 1))
    if several > 1 and not model:
        raise ValueError(f"{several} processes can share files, with --model; training with several is for the stages")
    rank, world = runtime.processes()
    return (k - 1) * world + rank, several


def finish(out, written, kept, problems, stop, tell):
    """Prints what was done and what was left out; of several processes rank 0 prints the sums. Returns the exit code.

    stop: not empty if the run was stopped: 130. problems: else 1 if there are any, of whatever process.
    """
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        print(f"denoise.py: left out: {problem}", file=sys.stderr)
        if problem not in tell.reasons:
            tell(beginning(problem), "left out", problem)
    (rank, world), counts = runtime.processes(), (written, kept, len(problems), len(stop))
    everyone = [counts] if world == 1 else [None] * world if rank == 0 else None
    if world > 1:
        dist.gather_object(counts, everyone)
    if rank:
        return 0
    written, kept, left, stopped = map(sum, zip(*everyone))
    print(f"{written} files written to {out}, {kept} were there already, {left} left out")
    if stopped:
        print("denoise.py: stopped; the same command goes on", file=sys.stderr)
    return 130 if stopped else 1 if left else 0


def suffix(share):
    """What tells the files of one share from those of another: nothing for one process alone."""
    return f".{share[0] + 1}-of-{share[1]}" if share[1] > 1 else ""


@contextlib.contextmanager
def lock(folder, share=(0, 1)):
    """Holds a folder, made if it is not there, for one run, or for each of its shares once; the system lets go of it.

    Raises ValueError if another run holds it. Does nothing where the system has no such locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = ["lock", f"lock{suffix(share)}"] if share[1] > 1 else ["lock"]
        files = [open(folder / name, "ab+") for name in names]  # noqa: SIM115  closed below
    except OSError as error:
        raise ValueError(f"{folder} cannot be written, {error.strerror}: give another folder with --out") from None
    try:
        if fcntl:
            for file, shared in zip(files, (share[1] > 1, False)):
                hold(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, folder)
        yield
    finally:
        for file in files:
            file.close()


def hold(file, kind, folder):
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {folder}: wait for its end, or give another --out") from None
    except OSError:  # a network disk without locks
        pass


# ---------------------------------------------------------------------------------------------------------------
# for other programs
# ---------------------------------------------------------------------------------------------------------------
def beginning(text):
    """The path with which a line about a file begins, or None: paths may hold spaces."""
    words = text.split(" ")
    starts = (" ".join(words[:k]).rstrip(":") for k in range(len(words), 0, -1))
    return next((start for start in starts if os.path.lexists(start)), None)


def teller(stream):
    """tell(input, status, reason=None, outputs=(), began=None, **more): writes a line of JSON about a file to `stream`.

    status: written, kept (it was there already) or left out, for which reason is given. began: time.monotonic() at the
    start of its item, so that each slice of a DICOM series has the seconds of the whole. Without a stream nothing is
    written. tell.reasons: those that were told.
    """

    def tell(input, status, reason=None, outputs=(), began=None, **more):
        if reason:
            tell.reasons.add(reason)
        seconds = 0.0 if began is None else round(time.monotonic() - began, 3)
        line = dict(input=input and str(input), outputs=list(map(str, outputs)), status=status)
        if stream:
            stream.write(json.dumps(line | dict(reason=reason, seconds=seconds) | more) + "\n")
            stream.flush()

    tell.reasons = set()
    return tell
