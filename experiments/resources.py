"""Seconds and memory of a piece of work, as bench.py, large_dataset.py and large_image.py report them."""

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def seconds_of(action, device, times=1):
    """Seconds that one call of action() takes, the mean of `times` calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / times


def median_seconds(actions, repeats, device, least=0.2):
    """{name: median seconds} of callables {name: action} that run in turn, `repeats` turns of `least` seconds each."""
    calls = {}
    for name, action in actions.items():
        seconds_of(action, device, 2)  # fills caches and memory
        calls[name] = max(1, round(least / seconds_of(action, device)))
    turns = [{name: seconds_of(f, device, calls[name]) for name, f in actions.items()} for _ in range(repeats)]
    return {name: statistics.median(turn[name] for turn in turns) for name in actions}


def peak_memory(device=None):
    """Megabytes that this process has had in memory at most (Linux; on CUDA, what torch has allocated), or None."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1.024e-3 if status.exists() else None


def in_own_process(function, *arguments):
    """function(*arguments), called in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_of_command(module, flags, folder="."):
    """(GiB in memory at most, seconds) of module.main(flags), run in a process of its own in that folder."""
    return in_own_process(call_main, module, list(map(str, flags)), str(folder))


def call_main(module, flags, folder):
    main, began = importlib.import_module(module).main, time.monotonic()
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        main(flags)
    return peak_memory() * 1e6 / 2**30, time.monotonic() - began
