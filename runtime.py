"""How a run is kept: device, precision, random numbers, checkpoints, resume, progress, log, several processes.

Every training stage has its own visible loop; what surrounds the loop is here, once:

    checkpoint = runtime.settle(args, PRESETS, "bsn")
    run = runtime.Training("bsn", args, checkpoint, model, optimizer, scheduler, ema, model_args)
    for step in run.steps():                       # resumes, shows progress, logs, saves; stops cleanly on Ctrl-C
        rng = runtime.step_rng(args.seed, step)    # the only randomness of this step
        ...
        run.report(loss)

Randomness is counted, not carried: each step seeds its own generator from (seed, step). A resumed run therefore
repeats the uninterrupted one bit for bit on a CPU with no random state to save, and N processes that each take
every N-th crop of a step's batch together see the batch of one process.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

RELEASE = "0.1.0"
SAVE_EVERY, LOG_EVERY = 60.0, 10.0  # seconds


# ---------------------------------------------------------------------------------------------------------------
# command line: one line for wrong input, presets, numbers
# ---------------------------------------------------------------------------------------------------------------
def command(main):
    """Runs `main()`; wrong input (ValueError, OSError) becomes one line on stderr and exit code 2.

    DIFFDENOISE_TRACEBACK=1 shows the traceback instead.
    """
    try:
        code = main()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(code)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os._exit(141)
    except (ValueError, OSError) as error:
        if os.environ.get("DIFFDENOISE_TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


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


def positive(text):
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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


def training_parser(doc, presets, model):
    """The flags that every training stage has. Flags left out (None) are filled in by `settle`."""
    p = network_parser(doc)
    p.add_argument("--model", default=model, help=f"checkpoint to write (default {model})")
    p.add_argument("--preset", choices=presets, help="fast: two CPU cores (default); paper: as published, a GPU")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run, or extend one by more --steps")
    p.add_argument("--steps", type=positive, help="optimizer steps")
    p.add_argument("--stop-at", type=positive, metavar="STEP", help="leave off after this step, to --resume later")
    p.add_argument("--batch", type=positive, help="crops per step, over all processes together")
    p.add_argument("--crop", type=positive, help="side of the square training crops, pixels")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.set_defaults(seed=None, precision=None)  # filled in by `settle`, as every flag that a checkpoint remembers
    return p


def settle(args, presets, stage):
    """Fills in the flags left out, from the checkpoint to resume or else the preset. Returns the checkpoint or None."""
    checkpoint = None
    if args.resume and (path := next((p for p in (part(args.model), Path(args.model)) if p.exists()), None)):
        checkpoint = load_checkpoint(path, stage)
    saved = checkpoint["args"] if checkpoint else {}
    args.preset = args.preset or saved.get("preset", "fast")
    for name, value in {"seed": 0, "precision": "auto", **presets[args.preset]}.items():
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name, value))
    if args.crop < 16:
        raise ValueError(f"--crop {args.crop} is too small: 16 pixels is the least")
    if args.resume and not checkpoint:
        say(f"{stage}: no {args.model} to resume; starting afresh")
    return checkpoint


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
def device(name="auto"):
    """'auto' takes CUDA, then MPS, then the CPU; anything else is a torch device name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name) == torch.device("cuda"):  # each process of torchrun has a card of its own
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def autocast(where, precision="auto"):
    """bfloat16 arithmetic where the processor has it and `precision` is auto, else float32."""
    if precision == "float32":
        fast = False
    elif where.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    else:
        fast = where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(where.type, torch.bfloat16, enabled=fast)


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
        dist.init_process_group()  # NCCL for tensors on CUDA, gloo for those on the CPU
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def shared(function, things, name):
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


def say(*words):
    """Prints, at once; of several processes, rank 0 alone."""
    if processes()[0] == 0:
        print(*words, flush=True)


def progress(things, name):
    """A bar over a sequence, on a terminal."""
    return tqdm(things, desc=name, disable=None, leave=False)


# ---------------------------------------------------------------------------------------------------------------
# checkpoints
# ---------------------------------------------------------------------------------------------------------------
def part(path):
    """Where the state of an unfinished run stands: beside the final name, which is taken only when complete."""
    return Path(f"{path}.part")


@contextlib.contextmanager
def whole(path):
    """Yields a temporary name beside `path`, which takes its place only if the block ends without error."""
    temporary = Path(f"{path}.tmp")  # of a killed run, too: written over by the next
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(path, size):
    """Claims `size` bytes for a file that is being written: HDF5 does not survive a disk that fills up, so let it show
    before. Raises OSError. Does nothing where the system cannot."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, int(size))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(error.errno, f"{os.strerror(error.errno)}: {path}") from None


def load_checkpoint(path, stage=None):
    """Reads a checkpoint of `stage`; runs no code that it may hold. Raises ValueError or OSError with one reason."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path} does not exist") from None
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds on files that are not its own
        reason = str(error).split(". ")[0]
        raise ValueError(
            f"{path} is not a whole checkpoint of plain types, and was not loaded: {reason}"[:200]
        ) from None
    found = state.get("stage") if isinstance(state, dict) else None
    if found is None or stage is not None and found != stage:
        raise ValueError(f"{path} is a checkpoint of {found or 'something else'}, not of {stage or 'this project'}")
    return state


def restore(network, path, stage, where):
    """Rebuilds `network` (a class) with the EMA weights of a checkpoint. Returns (model in eval mode, checkpoint)."""
    state = load_checkpoint(path, stage)
    try:
        model = network(**state["model_args"])
        model.load_state_dict(state["ema"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit {network.__name__}: {error}"[:200]) from None
    return model.to(where, memory_format=torch.channels_last).eval(), state


def fingerprint(path):
    """Hash of the EMA weights in a checkpoint: what they do, whoever trained them, wherever."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(load_checkpoint(path)["ema"].items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def warmup_cosine(optimizer, steps):
    """Learning rate: linear over the first 50 steps (or a tenth of few), then a cosine to zero."""
    warm = min(50, max(1, steps // 10))

    def factor(step):
        return min(1, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def ema_update(decay):
    """For AveragedModel(multi_avg_fn=...): exponential moving average that warms up over the first steps."""

    @torch.no_grad()
    def update(averaged, current, count):
        torch._foreach_lerp_(averaged, current, 1 - min(decay, float((1 + count) / (10 + count))))

    return update


# ---------------------------------------------------------------------------------------------------------------
# one training run
# ---------------------------------------------------------------------------------------------------------------
class Training:
    """Everything around a training loop; holds what a checkpoint holds.

    Args:
        stage: name written into the checkpoint. args: settled flags (seed, steps, stop_at, model, ...).
        checkpoint: what `settle` returned, or None to start afresh.
        model, optimizer, scheduler, ema: the run's state. model_args: rebuild the network as network(**model_args).
        extra: plain values that prediction needs besides. inputs: {flag: {volume name: fingerprint}} of the data.
    Attributes: net (the model, wrapped for several processes), rank, world.
    """

    def __init__(self, stage, args, checkpoint, model, optimizer, scheduler, ema, model_args, extra=None, inputs=None):
        self.stage, self.args, self.model, self.ema = stage, args, model, ema
        self.optimizer, self.scheduler, self.start, self.losses = optimizer, scheduler, 0, []
        self.fixed = dict(stage=stage, model_args=model_args, extra=extra or {}, inputs=inputs or {})
        self.rank, self.world = processes()
        if checkpoint:
            inputs, before = inputs or {}, checkpoint["inputs"]
            changed = [name for name in {**inputs, **before} if inputs.get(name) != before.get(name)]
            if changed:
                raise ValueError(f"{args.model} was trained with other data as --{changed[0]}: it cannot resume")
            if checkpoint["step"] > args.steps:
                raise ValueError(f"{args.model} is at step {checkpoint['step']} already, past --steps {args.steps}")
            self.start = checkpoint["step"]
            model.load_state_dict(checkpoint["model"])
            ema.module.load_state_dict(checkpoint["ema"])
            ema.n_averaged.fill_(self.start)
            optimizer.load_state_dict(checkpoint["optimizer"])
            scheduler.load_state_dict(checkpoint["scheduler"])
            scheduler.base_lrs = [args.lr]  # --lr and --steps may be new
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scheduler.lr_lambdas[0](self.start)
        elif self.rank == 0:
            part(args.model).unlink(missing_ok=True)  # of an earlier run, which this one does not continue
        if args.batch % self.world:
            raise ValueError(f"--batch {args.batch} cannot be shared by {self.world} processes")
        self.net = torch.nn.parallel.DistributedDataParallel(model) if self.world > 1 else model

    def report(self, loss):
        """Takes the loss of this step (a scalar tensor); read only when it is shown."""
        if self.rank == 0:
            self.losses.append(loss.detach())

    def agree(self, stop):
        """Whether any of the processes wants to stop: they must all leave after the same step."""
        if self.world == 1:
            return stop
        flag = torch.tensor(float(stop), device=next(self.model.parameters()).device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def save(self, path, step):
        state = dict(
            self.fixed,
            step=step,
            args=vars(self.args),
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
        )
        with whole(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{path} could not be written: {error}") from None

    def steps(self):
        """Yields the step numbers still to do, 0-based; stops after --stop-at or a signal with the state saved."""
        args, main = self.args, self.rank == 0
        stop = min(args.steps, args.stop_at or args.steps)
        signalled = []
        handlers = {s: signal.signal(s, lambda *_: signalled.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=args.steps, initial=self.start, desc=self.stage, disable=None if main else True, leave=False)
        began = saved = logged = time.monotonic()
        step = self.start
        try:
            path = Path(args.model).with_suffix(".jsonl") if main else os.devnull
            with open(path, "a" if self.start else "w") as log:
                last = step >= stop
                while not last:
                    yield step
                    step += 1
                    bar.update()
                    now, last = time.monotonic(), self.agree(bool(signalled)) or step >= stop
                    if main and (now - logged > LOG_EVERY or last):
                        loss = torch.stack(self.losses).mean().item()
                        if not np.isfinite(loss):
                            raise ValueError(f"the loss is {loss} at step {step}: try a lower --lr than {args.lr}")
                        line = dict(stage=self.stage, step=step, loss=round(loss, 6), seconds=round(now - began, 1))
                        print(json.dumps(line), file=log, flush=True)
                        bar.set_postfix(loss=f"{loss:.4g}")
                        self.losses, logged = [], now
                    if main and now - saved > SAVE_EVERY and not last:
                        self.save(part(args.model), step)
                        saved = now
        finally:
            bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)
        if main and step < args.steps:
            self.save(part(args.model), step)
        elif main:
            self.save(args.model, step)
            part(args.model).unlink(missing_ok=True)
            print(f"{self.stage}: {step} steps in {time.monotonic() - began:.0f} s -> {args.model}", flush=True)
        if dist.is_initialized():
            dist.barrier()
        if step < args.steps:
            if main:
                print(f"{self.stage}: left off at step {step} of {args.steps}; go on with --resume", flush=True)
            sys.exit(130 if step < stop else 0)
