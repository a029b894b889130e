"""Checkpoints: a training run that was interrupted goes on, bit for bit."""
import contextlib
import copy
import hashlib
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import disk
from run import InputError, all_sum, is_machine_fault, is_main_process, non_negative


def add_checkpoint_arguments(parser):
    parser.add_argument("--resume", action="store_true",
                        help="go on from the checkpoint of an interrupted run")
    parser.add_argument("--checkpoint-every", type=non_negative, default=180, metavar="SECONDS",
                        help="saved at the end of an epoch, where so long has passed")


def run_id(options, parts, arrays):
    """Twelve hex digits, a hash of a run's options, its split and the arrays it starts from.

    It is part of a checkpoint's name, so that no run finds, overwrites or deletes another's.
    """
    sha = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for matrix in (parts.train, parts.valid, parts.test):
        sha.update(np.ascontiguousarray(matrix.indptr))
        sha.update(np.ascontiguousarray(matrix.indices))
    for array in arrays:
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()[:12]


class Checkpoint:
    """The state of a training run after its last whole epoch; --resume continues bit for bit.

        with Checkpoint(path, resume) as checkpoint:
            progress = checkpoint.restore(model, optimizer) or {"epoch": 0, "best": None, ...}
            with checkpoint.loop(progress, n_epochs, "training") as epochs:
                for epoch in epochs:
                    ...
                    checkpoint.update(model, optimizer, progress)

    The state is written once `every` seconds have passed, and at Ctrl-C or SIGTERM. Both end
    the loop with KeyboardInterrupt, and --resume repeats the epoch that was under way. Several
    processes all finish that epoch first. results: those of the runs that are finished, saved
    too. Without a path nothing is written; outside of `with` no signal is caught.
    """

    def __init__(self, path=None, resume=False, every=180):
        self.path, self.every = path, every
        self.results, self.training = [], None
        self.last_written, self.is_writing, self.stop_asked = time.time(), False, False
        self.handlers = {}
        exists = False
        if path is not None:
            disk.check_can_be_written(path, "it is this run's checkpoint; work in another folder")
            exists = Path(path).exists()
        if exists and resume:
            with self.readable():
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.results, self.training = state["results"], state["training"]
        elif exists:
            print(f"{path}: checkpoint of this run, interrupted; --resume would continue it; "
                  "without --resume the run starts anew")
        elif resume:
            print(f"{path}: no checkpoint of this data and these options; "
                  "starting from the beginning")

    @contextlib.contextmanager
    def readable(self):
        """Turns what zipfile, pickle and torch raise for a damaged file into InputError."""
        try:
            yield
        except Exception as error:
            if is_machine_fault(error):
                raise
            raise InputError(f"{self.path}: not a checkpoint of this version, or damaged; "
                             "delete it and start anew") from None

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, kind, *_):
        # A second Ctrl-C must not cut off the writing that the first one causes.
        for number in self.handlers:
            signal.signal(number, signal.SIG_IGN)
        # After an error, or Ctrl-C outside the training loop, as in the last evaluation.
        if kind is not None and not issubclass(kind, InputError):
            self.write()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise InputError(f"interrupted; {self.remedy()}") from None

    def on_signal(self, number, frame):
        # Two cases in which an exception would do harm: other processes would wait for this one's
        # gradients, and torch.save would take it for an error of its own. Then the signal is only
        # noted, and `update` or `write` obeys it.
        if dist.is_initialized() or self.is_writing:
            self.stop_asked = True
        else:
            raise KeyboardInterrupt

    def restore(self, model, optimizer):
        """Puts back model, optimiser and random state; returns the interrupted run's progress.

        Returns None where there is nothing to go on from.
        """
        if self.training is None:
            return None
        with self.readable():
            model.load_state_dict(self.training["model"])
            optimizer.load_state_dict(self.training["optimizer"])
            torch.set_rng_state(self.training["random"])
            if self.training["random_cuda"] is not None:
                torch.cuda.set_rng_state(self.training["random_cuda"])
            progress = copy.deepcopy(self.training["progress"])
            print(f"{self.path}: goes on after epoch {progress['epoch']}")
        return progress

    @contextlib.contextmanager
    def loop(self, progress, last_epoch, title, first_epoch=1):
        """Wraps a training loop: yields a progress bar over the epochs that are still to come.

        Ctrl-C ends the loop and writes the checkpoint; progress["interrupted"] says whether it
        did. InputError if progress["best"] is still None then: there is nothing to hand over.
        """
        progress["interrupted"] = False
        bar = tqdm(range(progress["epoch"] + 1, last_epoch + 1), desc=title, unit="epoch",
                   initial=progress["epoch"] + 1 - first_epoch,
                   total=last_epoch + 1 - first_epoch, disable=not is_main_process())
        try:
            yield bar
        except KeyboardInterrupt:
            self.write()
            if progress["best"] is None:
                raise InputError("interrupted before the first validation; "
                                 f"{self.remedy()}") from None
            progress["interrupted"] = True
        bar.close()

    def update(self, model, optimizer, progress):
        """Keeps an epoch's state. KeyboardInterrupt if any of several processes must stop."""
        if self.path is None:
            return
        device = next(model.parameters()).device
        random_cuda = torch.cuda.get_rng_state() if device.type == "cuda" else None
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "random": torch.get_rng_state(), "random_cuda": random_cuda,
                 "progress": progress}
        self.training = copy.deepcopy(state)  # training goes on to change these tensors
        if time.time() - self.last_written >= self.every:
            self.write()
        if dist.is_initialized() and all_sum(torch.tensor(self.stop_asked * 1.0, device=device)):
            raise KeyboardInterrupt

    def finish(self, result):
        """One of several runs of a command is over: its result is kept."""
        self.results.append(result)
        self.training = None
        self.write()

    def write(self):
        """Writes the file. While nothing is finished, what an earlier run left there stays."""
        self.last_written = time.time()
        nothing_yet = self.training is None and not self.results
        if self.path is None or nothing_yet or not is_main_process():
            return
        state = {"results": self.results, "training": self.training}
        self.is_writing = True
        try:
            disk.write_file(self.path, lambda file: torch.save(state, file))
        # RuntimeError: torch's for a full disk; InputError: another program has the file open.
        except (OSError, RuntimeError, InputError) as error:
            print(f"{self.path}: not saved ({str(error).splitlines()[0]})", file=sys.stderr)
        self.is_writing = False
        if self.stop_asked and not dist.is_initialized():
            self.stop_asked = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def kept_if_writing_fails(self):
        """Wraps the writing of results: where it fails, --resume can write them later."""
        try:
            yield
        except BrokenPipeError:  # of stdout
            raise
        except OSError as error:
            self.write()
            raise InputError(f"{error.filename or 'the results'}: not written "
                             f"({error.strerror or error}); {self.remedy()}") from None

    def remedy(self):
        """What to type after an interruption."""
        if self.path and Path(self.path).exists():
            return "the same command with --resume goes on"
        return "there is no checkpoint yet; the same command starts anew"

    def remove(self):
        """Removes the file, at the end of a run that was not interrupted."""
        if not is_main_process():
            return
        Path(self.path).unlink(missing_ok=True)
        # Also the temporary file that a kill in the middle of writing has left.
        disk.remove_leftovers(self.path, age=0)
