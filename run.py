"""What every command shares: errors, whole files, argument types, processes, checkpoints.

The paper's method is not in here. The scripts end with `sys.exit(run.cli(main))`.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import errno
import glob
import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

# The scripts import this module before the libraries below, which take seconds to load, so that
# Ctrl-C prints one line from the start. Another program that imports us keeps its own hook.
HERE = Path(__file__).resolve().parent
main_file = getattr(sys.modules["__main__"], "__file__", None)
if main_file and Path(main_file).resolve().parent in (HERE, HERE / "paper"):
    def end_in_one_line(kind, error, trace):
        if kind is not KeyboardInterrupt:
            return sys.__excepthook__(kind, error, trace)
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(2)
    sys.excepthook = end_in_one_line

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


# --- Errors -------------------------------------------------------------------------------

class InputError(Exception):
    """An error that the user can mend: its one line names the file, the row and the remedy."""


def is_machines(error):
    """Whether an error during reading is the fault of the machine, not of the file."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) is not None


def disk_is_full(error):
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def explain(error):
    """The line to print for an error that the user can mend; None for a bug of ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was cached or written stays; run the same command again"
    if disk_is_full(error):
        name = error.filename or "while writing"
        return f"the disk is full ({name}); free some space and run the same command again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    out_of_memory = re.search("out of memory|allocate memory", str(error))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory):
        return "not enough memory; lower --batch, --dim or --candidates"
    return None


def print_error(message):
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def keep_freed_memory():
    """Tells glibc, where there is one, to keep freed memory.

    By default glibc gives tables of this size back to the system at every step, and the system
    clears every page again for the next table.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back
        libc.mallopt(-4, 0)   # M_MMAP_MAX: large blocks come from the heap too


def return_freed_memory():
    """Tells glibc to return freed memory now; otherwise each thread would keep its own."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def open_outputs():
    """Makes print safe where stdout or stderr is closed, or cannot write a λ."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def cli(main, argv=None):
    """Runs a script's main(argv); returns the exit code: 2, with a line, if explain has one."""
    keep_freed_memory()
    open_outputs()
    try:
        main(argv)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The program that reads the output, such as `head`, has ended. At exit Python must not
        # flush stdout into the broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        message = explain(error)
        if message is None:
            raise
        print_error(message)
        return 2


# --- Files that can be read ---------------------------------------------------------------

def check_is_file(path):
    """InputError where the path is a pipe, a device or a folder instead of a file.

    Reading a pipe or a device could wait for ever. A missing file passes: opening it will fail.
    """
    kind = kind_of_file(path)
    if kind not in ("a file", "no such file"):
        raise InputError(f"{path}: {kind}, where a file is expected")


def kind_of_file(path):
    """What is at this path, in words for a message; links are followed."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    for is_kind, kind in ((stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"),
                          (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket")):
        if is_kind(mode):
            return kind
    return "a device"


def open_npy(path, remedy):
    """A .npy file as a memory map; InputError with `remedy` where the file is not one."""
    check_is_file(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy, ast, zipfile and mmap raise errors of many kinds
        if is_machines(error):
            raise
        reason = " ".join(str(error).split())[:90]
        raise InputError(f"{path}: not a readable .npy array ({reason}); {remedy}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an .npz archive, not one array; {remedy}")
    return array


# --- Files that are whole or not there ----------------------------------------------------

def write_file(path, write, mode="wb"):
    """Writes a file through write(file) to a temporary name beside it, then renames it."""
    path = Path(os.path.realpath(path))  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except PermissionError:
        # On Windows a file that another program has open cannot be replaced.
        if not temporary.exists() or not path.exists():
            raise
        beside = path.with_name(f"{path.name}.new")
        os.replace(temporary, beside)
        raise InputError(f"{path}: cannot be replaced, another program may have it open; what "
                         f"was to be written is in {beside}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


UNFINISHED = "unfinished"  # what source.json holds while its folder is being made


def saved_key(folder, key, files=()):
    """The key that make_folder saved in `folder`; None where the folder must be made (anew).

    InputError where the folder has files but no such key: the files are the user's own.
    """
    key_path, saved = folder / "source.json", None
    if key_path.is_file():
        with contextlib.suppress(ValueError, RecursionError):
            saved = json.loads(key_path.read_bytes())
    if saved == UNFINISHED:
        return None
    if isinstance(saved, dict) and saved.keys() == key.keys():
        return saved if all((folder / name).is_file() for name in files) else None
    is_free = not os.path.lexists(folder)
    if folder.is_dir():
        is_free = all(name.startswith(".") for name in os.listdir(folder))
    if not is_free:
        raise InputError(f"{folder}: was not made here (no source.json of ours is in it), so "
                         f"nothing is written there; move it away, or use it: --data {folder}")
    return None


def make_folder(folder, key, write, files=()):
    """`folder`, made by write(temporary folder) unless it is there already with this key.

    key: a dictionary. It is written to source.json last, so a folder that has it is whole.
    files: if one of these is missing, the folder is made anew. InputError: see saved_key.
    """
    if saved_key(folder, key, files) == key:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with tempfile.TemporaryDirectory(".tmp", f".{folder.name}.", folder.parent) as name:
        temporary = Path(name) / folder.name
        temporary.mkdir()
        write(temporary)
        folder.mkdir(exist_ok=True)
        # Until the key is written, this marks the folder as ours and as one to be made anew.
        key_path = folder / "source.json"
        write_file(key_path, lambda file: json.dump(UNFINISHED, file), "w")
        # The files are moved into the existing folder, so that pictures fetched earlier stay.
        for path in sorted(temporary.rglob("*")):
            target = folder / path.relative_to(temporary)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                shutil.move(path, target)  # also to another disk, where the folder is a link
        write_file(key_path, lambda file: json.dump(key, file), "w")
    return folder


def check_outputs(outputs, inputs=(), folder=None):
    """InputError, before the work begins, where an output could not be written at its end.

    outputs: paths; None for an output that was not asked for. inputs: files that are read, as
    are the data files in `folder`. No output may overwrite one of these, not even through a
    link, or be a new file in `folder` that would be read as data.
    """
    outputs = [path for path in outputs if path is not None]
    real = [os.path.realpath(path) for path in outputs]
    remedy = "choose another output path"
    existing = {}  # {what identifies a file: its path}
    for path in outputs:
        if not path or real.count(os.path.realpath(path)) > 1:
            raise InputError(f"an output path is empty or given twice ('{path}'); {remedy}")
        check_can_be_written(path, remedy)
        if os.path.exists(path):
            existing[file_identity(path)] = path
        elif folder is not None and would_be_read(path, folder):
            raise InputError(f"{path}: would be read as a part of the data; {remedy}")
        remove_leftovers(path)
    if folder is not None and existing:
        inputs = [*inputs, *files_read(folder)]
    for read in inputs:
        path = existing.get(file_identity(read)) if os.path.exists(read) else None
        if path is not None:
            raise InputError(f"{path}: would overwrite {read}, which is read here; {remedy}")


def file_identity(path):
    """A value that two paths share if they lead, also through links, to the same file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def check_can_be_written(path, remedy):
    """InputError where no file can be renamed to this path. Makes the path's folder."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: its folder cannot be made ({error.strerror}); {remedy}") from None
    # Renaming would replace a device, and cannot replace a folder.
    kind = kind_of_file(path)
    if kind not in ("a file", "no such file"):
        raise InputError(f"{path}: {kind}, where a file is expected; {remedy}")
    try:
        tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent).close()
    except OSError:
        raise InputError(f"{path}: lies in a folder that cannot be written; {remedy}") from None


# In a data set's folder, a file with one of these endings may be an output of ours, unless it
# has one of the names below.
OUTPUTS = (".npz", ".json", ".csv", ".ckpt")
DATA_FILES = ("interactions.csv", "items.csv", "source.json", "image_urls.json")


def would_be_read(path, folder):
    """Whether a new file at this path would be read as data of the set in `folder`."""
    is_in_folder = Path(os.path.realpath(path)).parent == Path(os.path.realpath(folder))
    name = Path(path).name
    return is_in_folder and (name in DATA_FILES or name.endswith((".npy", ".inter")))


def files_read(folder):
    """Yields the files a data set may be read from; Amazon's raw files lie beside `folder`."""
    yield from folder.parent.glob("*.json.gz")
    for path in folder.rglob("*"):
        if path.name in DATA_FILES or path.suffix.lower() not in OUTPUTS:
            yield path


def remove_leftovers(path, age=3600):
    """Removes the temporary files and folders that killed runs have left for this path.

    Where the path is a folder, those inside it too. Ones younger than `age` seconds stay.
    """
    path = Path(os.path.realpath(path))
    leftovers = list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
    if path.is_dir():
        leftovers += path.glob(".*.tmp")
    for temporary in leftovers:
        # Another process may be removing the same ones.
        with contextlib.suppress(FileNotFoundError):
            # A younger one may belong to a run that is writing it at this moment.
            if time.time() - temporary.stat().st_mtime < age:
                continue
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink()


# --- Arguments ----------------------------------------------------------------------------

def parser(description, prog=None):
    """An ArgumentParser that takes no shortened flags: otherwise --k would mean --keep."""
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=Help,
                                   allow_abbrev=False)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag's default in --help, unless its text names it or there is none."""

    def _get_help_string(self, action):
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def non_negative(text):
    """argparse type: a whole number from 0 up."""
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError("must be 0 or more, and below 2^63")
    return value


def positive(text):
    """argparse type: a whole number from 1 up."""
    value = int(text)
    if not 1 <= value < 1 << 31:
        raise argparse.ArgumentTypeError("must be 1 or more, and below 2^31")
    return value


def fraction(text):
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return value


def device_name(text):
    """argparse type: auto, cpu or cuda; auto is cuda where there is one."""
    has_cuda = torch.cuda.is_available()
    if text not in ("auto", "cpu", "cuda") or (text == "cuda" and not has_cuda):
        raise argparse.ArgumentTypeError("auto, cpu, or cuda where torch finds one")
    if text == "auto":
        return "cuda" if has_cuda else "cpu"
    return text


def add_checkpoint_arguments(parser):
    parser.add_argument("--resume", action="store_true",
                        help="go on from the checkpoint of an interrupted run")
    parser.add_argument("--checkpoint-every", type=non_negative, default=180, metavar="SECONDS",
                        help="saved at the end of an epoch, where so long has passed")


# --- Several processes, under torchrun ----------------------------------------------------
#
# Each of the k processes holds all tables and draws the same random numbers (on GPUs too, if
# they are of one kind). Each takes every k-th row of a step's work. Gradients and losses are
# summed over the processes, and only the first process reports and writes.

@contextlib.contextmanager
def processes(device):
    """Joins the other processes where torchrun started several: gloo on CPUs, nccl on GPUs."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "LOCAL_RANK" not in os.environ:
        yield
        return
    try:
        backend, gpu = "gloo", None
        if device == "cuda":
            backend, gpu = "nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(gpu)
        dist.init_process_group(backend, timeout=timedelta(days=1), device_id=gpu)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"WORLD_SIZE and LOCAL_RANK are set, but no other process is found "
                         f"({str(error).splitlines()[0]}); unset them, or start with torchrun"
                         ) from None
    silence = contextlib.redirect_stdout(io.StringIO())
    with contextlib.nullcontext() if is_main_process() else silence:
        yield
    wait_for_all()
    dist.destroy_process_group()


def is_main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all():
    """Waits for all processes: if one ended with an error, torchrun would end the others."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first():
    """Runs the block in one process first: the others then find its downloads and caches."""
    if not is_main_process():
        wait_for_all()
    yield
    if is_main_process():
        wait_for_all()


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def my_share():
    """The slice of a step's rows that this process takes: all of them, or every k-th."""
    if not dist.is_initialized():
        return slice(0, None, 1)
    return slice(dist.get_rank(), None, dist.get_world_size())


def all_sum(x):
    """The tensor x, summed in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_gradients(model):
    """Adds up the gradients of all processes, so that all take the same step."""
    if not dist.is_initialized():
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            all_sum(parameter.grad)


# --- Checkpoints --------------------------------------------------------------------------

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
            check_can_be_written(path, "it is this run's checkpoint; work in another folder")
            exists = Path(path).exists()
        if exists and resume:
            with self.readable():
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.results, self.training = state["results"], state["training"]
        elif exists:
            print(f"{path}: checkpoint of this run, interrupted; --resume would continue it, "
                  "now it starts anew")
        elif resume:
            print(f"{path}: no checkpoint of this data and these options; "
                  "starting from the beginning")

    @contextlib.contextmanager
    def readable(self):
        """Turns what zipfile, pickle and torch raise for a damaged file into InputError."""
        try:
            yield
        except Exception as error:
            if is_machines(error):
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
        # If one process left its epoch, the others would wait for its gradients. And torch.save
        # takes an exception that is raised inside it for an error of its own.
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
            write_file(self.path, lambda file: torch.save(state, file))
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
        remove_leftovers(self.path, age=0)
