"""How networks are trained and kept: presets as flags, checkpoints, and everything around a training loop.

    checkpoint = training.resolve_args(args, PRESETS, "bsn")
    run = training.Training("bsn", args, checkpoint, network, model_args=model_args)
    for step in run.steps():                  # resumes, shows progress, logs, saves; Ctrl-C stops it cleanly
        rng = run.rng(step)                   # the only randomness of this step
        with run.autocast():
            loss = ...
        run.update(loss)                      # backward, clip, optimizer, learning rate, EMA

Each step seeds its own random generator from (seed, step). A resumed run therefore repeats the uninterrupted one bit
for bit on a CPU without a saved random state, and N processes, each taking every N-th crop of a step's batch, train on
the batch of one process.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from lib import runtime
from lib.runtime import atomic_write, positive, whole

SAVE_EVERY, LOG_EVERY = 60.0, 10.0  # seconds
SMOOTH, FALLEN = 50, 300  # steps: to average the loss over; to see whether it has fallen back for good
LEAST = 0.01  # by what share the loss must be below that of the trivial answer, to say that something was learned


# ---------------------------------------------------------------------------------------------------------------
# presets as flags
# ---------------------------------------------------------------------------------------------------------------
def presets(names, settings):
    """{preset: {setting: value}} of a stage's table {setting: (what it sets, value in names[0], in names[1], ...)}."""
    return {name: {key: row[k + 1] for key, row in settings.items()} for k, name in enumerate(names)}


def training_parser(doc, names, settings, choices=None, model="model.pt"):
    """The flags of a training stage: those that all have, and one for each setting of its presets.

    Args: names, settings: as for `presets`; the type of a flag is that of its values. choices: {setting: the values
    allowed}. Flags that the user leaves out stay None until `resolve_args`.
    """
    p = runtime.network_parser(doc)
    p.add_argument("--model", default=model, help=f"checkpoint to write (default {model})")
    p.add_argument("--preset", choices=names, help="fast: two CPU cores (default); paper: as published, a GPU")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run, or extend one by more --steps")
    p.add_argument("--stop-at", type=positive, metavar="STEP", help="leave off after this step, to --resume later")
    for key, (text, *values) in settings.items():
        flags = dict(choices=(choices or {}).get(key))
        if isinstance(values[0], bool):
            flags = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(values[0], list):
            flags |= dict(nargs="*" if [] in values else "+", type=whole if [] in values else positive)
        elif isinstance(values[0], int):
            flags |= dict(type=whole if 0 in values or key == "steps" else positive)
        elif isinstance(values[0], float):
            flags |= dict(type=float)
        shown = [" ".join(map(str, v)) or "none" if isinstance(v, list) else str(v) for v in values]
        default = ", ".join(f"{name}: {v}" for name, v in zip(names, shown)) if len(set(shown)) > 1 else shown[0]
        p.add_argument(f"--{key.replace('_', '-')}", help=f"{text} ({default})".replace("%", "%%"), **flags)
    p.set_defaults(seed=None, precision=None, **dict.fromkeys(settings))
    return p


def context(text):
    """The value of --context."""
    return text if text == "auto" else whole(text)


def context_flag(p):
    said = "neighbouring slices on each side that the network sees; auto: 2 for volumes, 0 for single images"
    p.add_argument("--context", type=context, default="auto", metavar="K", help=f"{said} (default auto)")


def prediction_flags(p, out):
    """The flags of a stage that predicts once it has trained."""
    p.add_argument("--out", default=out, help=f"prediction to write (default {out})")
    p.add_argument("--predict", action="store_true", help="only predict, with the trained --model")
    splits = ("train", "val", "test", "all")
    p.add_argument("--split", choices=splits, default="all", help="predict only this split (default all)")


def check_outputs(args, inputs):
    """`runtime.check_outputs` for such a stage: --model is read, or written."""
    if args.predict:
        runtime.check_outputs([*inputs, args.model], [args.out])
    else:
        runtime.check_outputs(inputs, [args.out, args.model])


def resolve_args(args, presets, stage):
    """Fills in the flags left out, from the checkpoint to resume or else the preset. Returns the checkpoint or None.

    Raises ValueError if the checkpoint is of another stage, there is no such device, or the crops are too small.
    """
    runtime.pick_device(args.device)
    paths = [path for path in (partial_path(args.model), Path(args.model)) if args.resume and path.exists()]
    checkpoint = load_checkpoint(paths[0], stage) if paths else None
    saved = checkpoint["args"] if checkpoint else {}
    args.preset = args.preset or saved.get("preset", "fast")
    for name, value in {"seed": 0, "precision": "auto", **presets[args.preset]}.items():
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name, value))
    if args.crop < 16:
        raise ValueError(f"--crop {args.crop} is too small: 16 pixels is the least")
    if args.resume and not checkpoint:
        runtime.print_once(f"{stage}: no {args.model} to resume; starting afresh")
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------
# checkpoints
# ---------------------------------------------------------------------------------------------------------------
def partial_path(path):
    """Where the state of a training run stands, with what it needs to go on: beside the checkpoint that it writes."""
    return Path(f"{path}.part")


def snapshots(model, steps, count):
    """{step: path} of the checkpoints that --snapshots keeps beside the model, evenly spaced, the last at the end."""
    path, numbers = Path(model), {round(steps * k / count): k for k in range(1, count + 1)}
    return {step: path.with_stem(f"{path.stem}_{k}_of_{count}") for step, k in numbers.items() if step}


def load_checkpoint(path, stage=None):
    """Reads a checkpoint of `stage`; runs no code that it may hold. Raises ValueError or OSError with one reason."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch raises many kinds on files that are not its own
        reason = str(error).split(". ")[0]
        raise ValueError(
            f"{path} is not a whole checkpoint of plain types, and was not loaded: {reason}"[:200]
        ) from None
    found = state.get("stage") if isinstance(state, dict) else None
    if found is None or stage is not None and found != stage:
        raise ValueError(f"{path} is a checkpoint of {found or 'something else'}, not of {stage or 'this project'}")
    return state


def load_network(build, path, stage, device):
    """(network in eval mode with the EMA weights, checkpoint) of a file; build(**model_args) makes the network."""
    state = load_checkpoint(path, stage)
    try:
        network = build(**state["model_args"])
        network.load_state_dict(state["ema"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit {build.__name__}: {error}"[:200]) from None
    return network.to(device, memory_format=torch.channels_last).eval(), state


def add_to_checkpoint(path, **extra):
    """Writes a checkpoint again, with more in its `extra`."""
    checkpoint = load_checkpoint(path)
    checkpoint["extra"] |= extra
    with atomic_write(path) as temporary:
        torch.save(checkpoint, temporary)


def fingerprint(path):
    """Hash of what a checkpoint does, its EMA weights, whoever trained them, wherever."""
    checkpoint = load_checkpoint(path)
    digest = hashlib.blake2b(str(checkpoint["extra"].get("planes", "")).encode(), digest_size=8)
    for name, value in sorted(checkpoint["ema"].items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def export_student(build, path, out):
    """Writes the student of a checkpoint as ONNX: `noisy` (B,2k+1,H,W) to `denoised` (B,1,H,W), from 16x16 up."""
    runtime.check_outputs([path], [out])
    network, checkpoint = load_network(build, path, "distill", "cpu")
    crop, k = checkpoint["extra"]["crop"], checkpoint["model_args"].get("context", 0)
    y = torch.rand(2, 2 * k + 1, 2 * crop + 8, 2 * crop + 40)  # larger than the window of the attention
    export_onnx(network.pool_locally(crop), y, out, ["noisy"], ["denoised"])
    print(f"distill: {path} -> {out}", flush=True)


def export_onnx(network, example, path, inputs, outputs):
    """Writes network(example) as ONNX with free batch, height and width; inputs, outputs: names. Needs onnxscript."""
    try:
        import onnxscript  # noqa: F401  what torch.onnx writes with
    except ImportError:
        raise ValueError("--export needs the package onnxscript: pip install onnxscript") from None
    network = network.to(memory_format=torch.contiguous_format)
    logging.disable(logging.WARNING)  # torch tells of packages that it could use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
            program = torch.export.export(network, (example,), dynamic_shapes=(free,))
            made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    finally:
        logging.disable(logging.NOTSET)
    with runtime.atomic_write(path) as temporary:
        made.save(temporary)


def warmup_cosine(step, steps):
    """Learning rate as a share of its peak: linear over the first 50 steps (or a tenth of few), then a cosine to 0."""
    warm = min(50, max(1, steps // 10))
    return min(1, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))


@torch.no_grad()
def ema_update(averaged, network, count, decay):
    """Moves the exponential moving average of a network's weights, `count` steps old, towards them; at first faster."""
    kept = min(decay, (1 + count) / (10 + count)) if count else 0
    torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - kept)


# ---------------------------------------------------------------------------------------------------------------
# one training run
# ---------------------------------------------------------------------------------------------------------------
class Training:
    """Everything around a training loop: optimizer, learning rate, EMA, resume, checkpoints, log, several processes.

    Args:
        stage: name written into the checkpoint. args: resolved flags (seed, steps, batch, lr, ema, model, ...).
        checkpoint: what `resolve_args` returned. network: the network to train.
        model_args: rebuild it as build(**model_args). extra: plain values that prediction needs besides.
        inputs: {flag: {volume name: fingerprint}} of the data. schedule: (step, steps) to a share of args.lr.
    Attributes: net (the network, wrapped for several processes), device, rank, world.
    Raises ValueError if the checkpoint cannot be resumed with these arguments.

    While it trains, and afterwards for `--resume --steps N`, the whole state stands in `partial_path(args.model)`; the
    checkpoint itself, written at the end, holds what prediction needs: the EMA weights and the arguments.
    """

    def __init__(
        self, stage, args, checkpoint, network, *, model_args, extra=None, inputs=None, schedule=warmup_cosine
    ):
        self.stage, self.args, self.start = stage, args, 0
        self.losses, self.errors = [], []  # since the last line of the log
        self.smooth, self.best, self.fallen = None, 0.0, None  # see `watch`
        self.fixed = dict(stage=stage, model_args=model_args, extra=extra or {}, inputs=inputs or {})
        self.device, (self.rank, self.world) = runtime.pick_device(args.device), runtime.processes()
        if args.batch % self.world:
            raise ValueError(f"--batch {args.batch} cannot be shared by {self.world} processes")
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.betas, self.clip = (0.9, getattr(args, "beta2", 0.999)), getattr(args, "clip", 1.0)
        settings = dict(lr=args.lr, betas=self.betas, weight_decay=0)
        self.optimizer = torch.optim.AdamW(network.parameters(), fused=True, **settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: schedule(step, args.steps))
        self.ema = copy.deepcopy(network)
        if checkpoint:
            self.resume(checkpoint)
        elif self.rank == 0:
            partial_path(args.model).unlink(missing_ok=True)  # of an earlier run, which this one does not continue
        self.net = torch.nn.parallel.DistributedDataParallel(network) if self.world > 1 else network

    def resume(self, checkpoint):
        """Takes up the state of a checkpoint; raises ValueError if this run does not continue it."""
        path, inputs, before = self.args.model, self.fixed["inputs"], checkpoint["inputs"]
        changed = [name for name in {**inputs, **before} if inputs.get(name) != before.get(name)]
        if changed:
            raise ValueError(f"{path} was trained with other data as --{changed[0]}: it cannot resume")
        for name, value in {**checkpoint["model_args"], **checkpoint["extra"]}.items():
            given = getattr(self.args, name, None)
            if given not in (None, "auto", value, checkpoint["args"].get(name)):
                raise ValueError(f"--{name} {given}: {path} was trained with {value}: it cannot resume")
        self.start = checkpoint["step"]
        if self.start > self.args.steps:
            raise ValueError(f"{path} is at step {self.start} already, past --steps {self.args.steps}")
        self.ema.load_state_dict(checkpoint["ema"])
        if "optimizer" not in checkpoint:
            if self.start < self.args.steps:
                raise ValueError(f"{path} cannot be extended: the state of its training, {path}.part, is gone")
            return
        self.network.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.scheduler.base_lrs = [self.args.lr]  # --lr and --steps may be new
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = self.args.lr * self.scheduler.lr_lambdas[0](self.start), self.betas

    def rng(self, step, *counters):
        """The numpy generator of a step."""
        return runtime.step_rng(self.args.seed, step, *counters)

    def autocast(self):
        return runtime.autocast(self.device, self.args.precision)

    def to_device(self, *tensors):
        return [x.to(self.device, memory_format=torch.channels_last) for x in tensors]

    def update(self, loss, trivial=None, mse=None):
        """One step of the optimizer, the learning rate and the EMA; the loss (a scalar tensor) is read when logged.

        trivial: the loss of the trivial answer to the same batch, an output of zero or the input itself, for `watch`.
        mse: an estimate of the mean square error against clean images, if there is one: shown and logged as PSNR.
        """
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        ema_update(self.ema, self.network, self.scheduler.last_epoch - 1, self.args.ema)
        if self.rank == 0:
            self.losses.append(loss.detach())
            self.errors += [] if mse is None else [mse.detach()]
            if trivial is not None:
                pair = torch.stack([loss.detach().float(), trivial.detach().float()])
                self.smooth = pair if self.smooth is None else self.smooth.lerp(pair, 1 / SMOOTH)

    def watch(self, step):
        """Compares the smoothed loss with that of the trivial answer; returns both as plain numbers, or None.

        Raises ValueError if the network was better than that and has fallen back for FALLEN steps.
        """
        if self.smooth is None or step - self.start < 2 * SMOOTH:
            return None
        loss, trivial = self.smooth.tolist()
        gain = (trivial - loss) / max(abs(trivial), 1e-12)
        if gain > self.best:
            self.best, self.best_loss, self.best_step = gain, loss, step
        if self.best < 2 * LEAST or gain > self.best / 10:
            self.fallen = None
        elif self.fallen is None:
            self.fallen = step
        elif step - self.fallen >= FALLEN:
            was = f"was {self.best_loss:.4g} at step {self.best_step} and is {loss:.4g} at step {step}"
            lower = f"try a lower --lr than {self.args.lr:g}"
            raise ValueError(f"the loss {was}, no better than that of the trivial answer, {trivial:.4g}: {lower}")
        return loss, trivial

    def agree(self, stop):
        """Whether any of the processes wants to stop: they must all leave after the same step."""
        if self.world == 1:
            return stop
        flag = torch.tensor(float(stop))  # on the CPU: no step waits for the device
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def save(self, path, step, *, whole):
        """Writes a checkpoint: with the `whole` state of the training, or what prediction needs."""
        state = dict(self.fixed, step=step, args=vars(self.args), ema=self.ema.state_dict())
        if whole:
            state |= dict(model=self.network.state_dict(), optimizer=self.optimizer.state_dict())
            state |= dict(scheduler=self.scheduler.state_dict())
        with atomic_write(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{path} could not be written: {error}") from None

    def steps(self):
        """Yields the step numbers still to do, 0-based; stops after --stop-at or a signal with the state saved.

        Raises ValueError if the loss is not finite.
        """
        args, main = self.args, self.rank == 0
        stop = min(args.steps, args.stop_at or args.steps)
        held = contextlib.ExitStack()
        signalled = held.enter_context(runtime.stoppable("this step"))
        bar = tqdm(total=args.steps, initial=self.start, desc=self.stage, disable=None if main else True, leave=False)
        began = saved = logged = time.monotonic()
        step, watched = self.start, None
        keep = snapshots(args.model, args.steps, getattr(args, "snapshots", 0)) if main else {}
        try:
            path = Path(args.model).with_suffix(".jsonl") if main else os.devnull
            with open(path, "a" if self.start else "w") as log:
                last = step >= stop
                while not last:
                    yield step
                    step += 1
                    bar.update()
                    now, last = time.monotonic(), self.agree(bool(signalled)) or step >= stop
                    due = now - saved > SAVE_EVERY  # what is saved has been looked at before
                    if main and (now - logged > LOG_EVERY or due or step in keep or last):
                        loss, *mse = (torch.stack(v).mean().item() for v in (self.losses, self.errors) if v)
                        if not np.isfinite(loss):
                            raise ValueError(f"the loss is {loss} at step {step}: try a lower --lr than {args.lr}")
                        line = dict(stage=self.stage, step=step, loss=round(loss, 6), seconds=round(now - began, 1))
                        watched = self.watch(step)
                        line |= dict(zip(("smoothed", "trivial"), watched)) if watched else {}
                        shown = dict(loss=f"{loss:.4g}")
                        if mse and mse[0] > 0:
                            line["psnr"] = round(-10 * math.log10(mse[0]), 2)
                            shown = {"estimated PSNR": f"{line['psnr']:.2f} dB"}
                        print(json.dumps(line), file=log, flush=True)
                        bar.set_postfix(shown)
                        self.losses, self.errors, logged = [], [], now
                    if step in keep:
                        self.save(keep[step], step, whole=False)
                    if main and (due or last):
                        self.save(partial_path(args.model), step, whole=True)
                        saved = now
        finally:
            bar.close()
            held.close()
        if main and step == args.steps:  # the state first: killed between the two, the run can still end
            self.save(args.model, step, whole=False)
            print(f"{self.stage}: {step} steps in {time.monotonic() - began:.0f} s -> {args.model}", flush=True)
            if watched and watched[1] - watched[0] < LEAST * abs(watched[1]):
                low = f"its loss is {watched[0]:.4g}, that of the trivial answer {watched[1]:.4g}"
                print(f"{self.stage}: the network has learned nothing: {low}", flush=True)
        if dist.is_initialized():
            dist.barrier()
        if step < args.steps:
            runtime.print_once(f"{self.stage}: left off at step {step} of {args.steps}; go on with --resume")
            sys.exit(130 if step < stop else 0)
