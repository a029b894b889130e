"""What every command shares: errors, argument types, several processes.

The paper's method is not in here. The scripts end with `sys.exit(run.cli(main))`.
"""
import argparse
import contextlib
import ctypes
import errno
import io
import os
import re
import sys
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

import torch
import torch.distributed as dist


# --- Errors -------------------------------------------------------------------------------

class InputError(Exception):
    """An error that the user can mend: its one line names the file, the row and the remedy."""


def is_machine_fault(error):
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
        return "not enough memory; lower --batch or --dim, in finetune.py also --candidates"
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
