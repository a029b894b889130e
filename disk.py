"""Files on disk: checked before they are read, and written whole or not at all.

Inputs may be pipes, folders or damaged, and an output must not overwrite what is the user's.
"""
import contextlib
import csv
import glob
import json
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import numpy as np

from run import InputError, is_machine_fault


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
        if is_machine_fault(error):
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
