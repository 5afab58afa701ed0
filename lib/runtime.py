"""What every program of this project shares: command line, device, precision, random numbers, processes, whole files.

Randomness is counted, not carried: whatever is random seeds its own generator from (seed, counters), so that a resumed
run repeats an uninterrupted one, and N processes together do what one process would.
"""

import argparse
import contextlib
import datetime
import errno
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

RELEASE = "0.1.0"


# ---------------------------------------------------------------------------------------------------------------
# command line: wrong input is one line; numbers as people write them
# ---------------------------------------------------------------------------------------------------------------
def command(main):
    """Runs `main()`; wrong input (ValueError, OSError) becomes one line on stderr and exit code 2.

    DIFFDENOISE_TRACEBACK=1 shows the traceback instead.
    """
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os._exit(141)
    except (ValueError, OSError) as error:
        if os.environ.get("DIFFDENOISE_TRACEBACK"):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        advice = ": make room, then run the same command again" if full else ""
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        left = sys.exc_info()[1]
        if isinstance(left, SystemExit) and dist.is_initialized():  # the group's threads abort a process that tidies up
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(left.code or 0)


def fraction(text):
    """'6/255' or '0.0235' as a number."""
    numerator, _, denominator = str(text).partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.0235 or 6/255") from None


def size(text):
    """'2G', '500M' or a plain number of bytes."""
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1:].upper(), 0)
    try:
        value = float(text[:-1] if unit else text)
    except ValueError:
        value = 0
    if not 0 < value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 2G or 500M")
    return int(value * 2**unit)


def whole(text, least=0):
    """A whole number of at least 0."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def positive(text):
    """A whole number of at least 1."""
    return whole(text, 1)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help tells more)\n")


def parser(doc):
    """An argument parser that shows a module's docstring."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def network_parser(doc):
    """The flags of every program that runs a network."""
    p = parser(doc)
    p.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    p.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), or a torch device (default auto)")
    p.add_argument(
        "--precision", choices=("auto", "float32"), default="auto", help="auto: bfloat16 where the processor has it"
    )
    return p


def check_outputs(inputs, outputs):
    """Refuses, before any work is done, outputs that cannot be written or that would replace an input."""
    if len({Path(out).resolve() for out in outputs}) < len(outputs):
        raise ValueError(f"the outputs {', '.join(map(str, outputs))} need names of their own")
    for out in map(Path, outputs):
        if not out.parent.is_dir():
            raise ValueError(f"the folder of {out} does not exist")
        if out.is_dir() or not os.access(out.parent, os.W_OK):
            raise ValueError(f"{out} cannot be written")
        for path in inputs:
            if path and out.exists() and Path(path).exists() and out.samefile(path):
                raise ValueError(f"{out} would replace the input {path}: give another name")


# ---------------------------------------------------------------------------------------------------------------
# device, precision, random numbers, processes
# ---------------------------------------------------------------------------------------------------------------
def pick_device(name="auto"):
    """'auto' takes CUDA, then MPS, then the CPU; anything else is a torch device name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name) == torch.device("cuda"):  # each process of torchrun has a card of its own
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, AttributeError) as error:  # the last: torch built without CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def autocast(device, precision="auto"):
    """bfloat16 arithmetic where the processor has it and `precision` is auto, else float32."""
    if precision == "float32":
        fast = False
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def step_rng(seed, *counters):
    """A numpy generator for one step (or one slice) of one seed: the same whenever and wherever it is asked for."""
    return np.random.default_rng([seed & (2**63 - 1), *counters])


def gaussian(rng, *shape):
    """Standard normal float32 tensor drawn on the CPU, so that every device gets the same numbers."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def processes():
    """(rank, number) of the processes started by torchrun; (0, 1) without it. Sets up torch.distributed once."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        # NCCL for tensors on CUDA, gloo for those on the CPU; one may reach a meeting point hours before another
        dist.init_process_group(timeout=datetime.timedelta(days=30))
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def first_alone(function, *args):
    """Calls function(*args) in the first of several processes, for which the others wait."""
    rank, world = processes()
    if rank == 0:
        function(*args)
    if world > 1:
        dist.barrier()


def map_over_ranks(function, things, name):
    """Yields (thing, function(thing)) in order, with a bar on a terminal; processes take the things in turn.

    Only rank 0 gets the results, which travel to it; the others work and yield nothing. function returns numpy arrays.
    """
    rank, world = processes()
    things = list(things)
    for k in tqdm(range(0, len(things), world), desc=name, disable=True if rank else None, leave=False):
        mine = function(things[k + rank]) if k + rank < len(things) else None
        results = [mine]
        if world > 1:
            results = [None] * world if rank == 0 else None
            dist.gather_object(mine, results)
        if rank == 0:
            yield from zip(things[k : k + world], results)


def print_once(*words):
    """Prints, at once; of several processes, rank 0 alone."""
    if processes()[0] == 0:
        print(*words, flush=True)


def progress(things, name):
    """A bar over a sequence with the time left, on a terminal; of several processes, that of rank 0 alone."""
    return tqdm(things, desc=name, disable=True if os.environ.get("RANK", "0") != "0" else None, leave=False)


@contextlib.contextmanager
def stoppable(what):
    """Yields a list that Ctrl-C or SIGTERM fills, for a loop to end after `what` it does; the second exits at once."""
    asked = []

    def ask(*_):
        if asked:
            os._exit(130)
        asked.append(True)
        if os.environ.get("RANK", "0") == "0":
            print(f"stopping after {what}; once more to stop at once", file=sys.stderr, flush=True)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary name beside `path`; the file takes its place only if the block ends without error."""
    temporary = Path(f"{path}.tmp")  # of a killed run, too: written over by the next
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(path, size):
    """Claims `size` bytes for a file that is being written, or raises OSError: HDF5 does not survive a full disk.

    Does nothing where the system cannot.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, int(size))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(error.errno, f"{os.strerror(error.errno)}: {path}") from None
