"""The runs behind the paper's tables: finds those that are there, runs those that are missing.

A cell is one pre-training and one fine-tuning, by the commands that a reader would type. Its
results are kept in <results>/<data>/cells: <name>.json, and beside it <name>.npz with each user's
test. So an interrupted sweep goes on where it stopped, and a second call only reads. A cell's name
depends on all options of its commands, on the split and on the features, but not on the code:
after a change of the code, name another --results.
"""
import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, TextIO

import run  # before the libraries: from here on Ctrl-C ends in one line

import numpy as np
from tqdm import tqdm

import data
import disk
import finetune
import mmcpr
from paper import baselines

ROOT = Path(__file__).resolve().parent.parent

# The arguments with which Python runs a script, and the module that has the script's options.
SCRIPTS = {"mmcpr.py": ["mmcpr.py"], "finetune.py": ["finetune.py"],
           "baselines.py": ["-m", "paper.baselines"]}
MODULES = {"mmcpr.py": mmcpr, "finetune.py": finetune, "baselines.py": baselines}

# Parts of the scripts' error messages, where the data has nothing for a cell and where a
# learning rate is too high.
NOTHING = ("nothing for --method", "--lam 1 trains CIMA alone")
DIVERGED = "not finite"


# --- Scripts, several at a time -----------------------------------------------------------

class Script(NamedTuple):
    """A script that is running, and the file that its stderr goes to."""
    process: subprocess.Popen
    messages: TextIO


def start(command, folder, jobs):
    """Starts a command in `folder`, with its share of the cores."""
    n_threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": str(n_threads)} | os.environ
    # So that -m paper.baselines is found from there.
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    parent = os.getpid()

    def end_with_parent():
        # The script gets SIGTERM when its parent dies, even of kill -9 (PR_SET_PDEATHSIG is 1).
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    # In a session of its own a script does not get the terminal's Ctrl-C, only our SIGTERM: one
    # signal, not two.
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=messages,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None)
    return Script(process, messages)


def error_of(script):
    """None where a script that has ended was successful, else its error message."""
    script.messages.seek(0)
    lines = script.messages.read().strip().splitlines()
    script.messages.close()
    code = script.process.returncode
    if code == 0:
        return None
    for line in reversed(lines):
        # The script's own error line, or the error line of a traceback.
        if re.match(r"error: |\w+Error: ", line):
            return line.removeprefix("error: ")
    if code < 0 or not lines:
        return f"ended with {code}, without a message"
    return lines[-1]


@contextlib.contextmanager
def noted_signals():
    """Ctrl-C and SIGTERM do nothing but add their number to the list that this yields."""
    noted, handlers = [], {}

    def note(number, frame):
        noted.append(number)

    # By default a signal would raise an exception in the middle of whatever is going on.
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_side_by_side(commands, jobs, keep, title, folder):
    """Runs {key: command}, `jobs` at a time, in `folder`; calls keep(key, error) as each ends.

    Where keep raises an InputError or OSError, no other script is started, but those that are
    running finish. At Ctrl-C or SIGTERM no other script is started either, and those that are
    running get SIGTERM, at which mmcpr.py and finetune.py save a checkpoint. Where this process
    dies of kill -9, its scripts end too on Linux; elsewhere they run to their end.
    """
    waiting = list(commands.items())
    running = {}
    failure = None
    with noted_signals() as signals:
        bar = tqdm(total=len(commands), desc=title, unit="run", disable=not commands)
        try:
            while running or (waiting and failure is None):
                # Scripts are started in order, up to `jobs` side by side.
                while waiting and len(running) < jobs and failure is None:
                    key, command = waiting.pop(0)
                    running[key] = start(command, folder, jobs)
                # Scripts run for seconds to hours: looking twenty times a second costs nothing.
                time.sleep(0.05)
                # A second signal is passed on too: the scripts then stop without saving.
                if signals:
                    signals.clear()
                    failure = KeyboardInterrupt()
                    for script in running.values():
                        script.process.terminate()
                # Scripts that have ended are kept before others are started, after a signal too.
                for key in list(running):
                    if running[key].process.poll() is None:
                        continue
                    try:
                        keep(key, error_of(running.pop(key)))
                    except (run.InputError, OSError) as error:
                        # Of several failures the first one is raised in the end.
                        failure = failure or error
                    bar.update()
        finally:
            # Nothing is running here any more, unless the loop itself has failed.
            for script in running.values():
                script.process.terminate()
            bar.close()
    # Only now, when nothing is running any more.
    if failure is not None:
        raise failure


# --- Cells --------------------------------------------------------------------------------

class Cell(NamedTuple):
    """One run behind Table 2 or another table or figure."""
    pretraining: tuple | None  # mmcpr.py or baselines.py, then its flags; None: a random start
    finetuning: tuple          # flags of finetune.py
    seed: int
    data: tuple = ()           # flags of both scripts, for a split other than the sweep's


def name_of(parts):
    """A name for anything that JSON can hold: sixteen hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Cells:
    """Runs the cells that are missing, and keeps what they found."""

    def __init__(self, data_flags, encoding_flags, fingerprint, folder, jobs):
        """The flags say which data and features all cells use; fingerprint: of these;
        folder: results/<data>; jobs: how many scripts to run at a time."""
        self.data_flags, self.encoding_flags = data_flags, encoding_flags
        self.fingerprint, self.jobs = fingerprint, jobs
        self.folder = folder.resolve()
        self.cells_folder = self.folder / "cells"
        self.tables_folder = self.folder / "tables"
        self.cells_folder.mkdir(parents=True, exist_ok=True)
        self.tables_folder.mkdir(parents=True, exist_ok=True)
        for used_folder in (self.folder, self.cells_folder, self.tables_folder):
            disk.remove_leftovers(used_folder)
        self.parsers = {script: module.arguments() for script, module in MODULES.items()}
        self.used = {}  # what the present target has asked for

    def all_options(self, script, *flags):
        """All options of a command, defaults included, but not data.BESIDE, data and device."""
        options = {}
        for name, value in vars(self.parsers[script].parse_args(flags)).items():
            # The fingerprint identifies a data set, so its folder may move. The device does not
            # count either, although a GPU draws other numbers: a cell made on a GPU stands for
            # one made on a CPU.
            if name not in data.BESIDE and not name.startswith(("data", "device")):
                options[name] = value
        return [script, options]

    def cell_path(self, cell):
        """The path of the cell's results: JSON, null where the data has nothing for the cell."""
        before = self.all_options(*cell.pretraining) if cell.pretraining else None
        after = self.all_options("finetune.py", *cell.finetuning)
        name = name_of([self.fingerprint, cell.data, cell.seed, before, after])
        return self.cells_folder / f"{name}.json"

    def table_path(self, cell):
        """The path of the tables that the cell starts from."""
        before = self.all_options(*cell.pretraining)
        name = name_of([self.fingerprint, cell.data, cell.seed, before])
        return self.tables_folder / f"{name}.npz"

    def run(self, cells, title, may_diverge=False):
        """Runs the cells that are missing, and returns the results of all, in order.

        A cell's result is a dict, or None where the data has nothing for it. Where its learning
        rate is too high, the result is None if may_diverge, else this raises an InputError.
        """
        found, missing = {}, []
        # Each cell once, in order. Damaged or diverged ones are reported before anything is run.
        for cell in dict.fromkeys(cells):
            if self.cell_path(cell).exists():
                found[cell] = self.read(cell, may_diverge)
            else:
                missing.append(cell)
        self.make_tables(missing, title, may_diverge)
        self.finetune(missing, title, may_diverge)
        for cell in missing:
            found[cell] = self.read(cell, may_diverge)
        for cell in cells:
            self.used[cell] = found[cell]
        return [found[cell] for cell in cells]

    def make_tables(self, cells, title, may_diverge):
        """Runs the pre-trainings whose tables are missing, each once, also where cells share it."""
        commands, cells_of = {}, {}
        for cell in cells:
            if cell.pretraining is None:
                continue
            path = self.table_path(cell)
            if not path.exists():
                commands[path] = self.pretraining_command(cell)
                # Cells that differ in fine-tuning alone start from the same tables.
                cells_of.setdefault(path, []).append(cell)

        def keep(path, error):
            if error is None:
                # Only the tables of a finished pre-training get their final name.
                os.replace(unfinished(path), path)
            else:
                cell = cells_of[path][0]
                error = f"{' '.join(cell.pretraining)}, seed {cell.seed}: {error}"
                self.keep_failure(cells_of[path], error, may_diverge)

        run_side_by_side(commands, self.jobs, keep, f"{title}: pre-training", self.cells_folder)

    def finetune(self, cells, title, may_diverge):
        """Runs the fine-tunings of cells whose tables are there."""
        commands, reports = {}, {}
        for cell in cells:
            if self.cell_path(cell).exists():
                continue  # its pre-training found nothing to do, or diverged
            # Read before the run, so that damaged tables are reported at once.
            reports[cell] = self.pretraining_report(cell)
            commands[cell] = self.finetuning_command(cell)

        def keep(cell, error):
            if error is None:
                self.keep_result(cell, reports[cell])
            else:
                flags = " ".join(("finetune.py", *cell.finetuning))
                self.keep_failure([cell], f"{flags}, seed {cell.seed}: {error}", may_diverge)

        run_side_by_side(commands, self.jobs, keep, f"{title}: fine-tuning", self.cells_folder)

    def pretraining_command(self, cell):
        command = script_command(*cell.pretraining)
        command += [*self.data_flags, *cell.data, *self.encoding_flags]
        command += ["--seed", str(cell.seed)]
        command += ["--out", str(unfinished(self.table_path(cell)))]
        if cell.pretraining[0] == "mmcpr.py":
            # An interrupted run goes on; baselines.py keeps no checkpoint and starts anew.
            command.append("--resume")
        return command

    def finetuning_command(self, cell):
        init = str(self.table_path(cell)) if cell.pretraining else "random"
        command = script_command("finetune.py", *cell.finetuning)
        command += [*self.data_flags, *cell.data, "--init", init, "--seeds", str(cell.seed)]
        command += ["--metrics", str(self.metrics_path(cell))]
        command += ["--per-user", str(self.per_user_path(cell)), "--resume"]
        return command

    def metrics_path(self, cell):
        """Where finetune.py writes its metrics, before they become a part of the cell."""
        return self.cell_path(cell).with_suffix(".metrics")

    def per_user_path(self, cell):
        """Where finetune.py writes each user's test."""
        return self.cell_path(cell).with_suffix(".npz")

    def per_user(self, cell):
        """{name: array} of that file (finetune.write_per_user); InputError where it is damaged."""
        path = self.per_user_path(cell)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except Exception as error:  # zipfile, zlib and numpy each raise their own
            if not isinstance(error, FileNotFoundError) and getattr(error, "errno", None):
                raise  # an error of the machine, not of the file
            raise damaged(path, self.cell_path(cell)) from None

    def pretraining_report(self, cell):
        """The report of the tables that a cell starts from; None for a random start."""
        if cell.pretraining is None:
            return None
        path = self.table_path(cell)
        try:
            meta = data.load_embeddings(path)["meta"]
        except run.InputError:
            raise damaged(path) from None
        return meta["report"] | {"method": meta["method"]}

    def keep_result(self, cell, report):
        """Makes a cell of what finetune.py found and of the report of its pre-training."""
        path = self.metrics_path(cell)
        init = self.table_path(cell).name if cell.pretraining else "random"
        found = json.loads(path.read_text()) | {"data": self.folder.name, "init": init}
        self.write(cell, cell._asdict() | {"report": report, "finetune": found})
        # The cell holds it all now.
        path.unlink()

    def keep_failure(self, cells, error, may_diverge):
        """Keeps a failure that a second run would only repeat; InputError for any other."""
        # This data has nothing for the system: its row is left out.
        if any(words in error for words in NOTHING):
            outcome = None
        elif DIVERGED in error:
            outcome = {"diverged": error}
        else:
            raise run.InputError(error)
        for cell in cells:
            self.write(cell, outcome)
        if outcome and not may_diverge:
            raise run.InputError(error)

    def write(self, cell, outcome):
        def write_json(file):
            json.dump(outcome, file, indent=1)
        disk.write_file(self.cell_path(cell), write_json, "w")

    def read(self, cell, may_diverge):
        """What run returns for a cell that is there."""
        path = self.cell_path(cell)
        try:
            outcome = json.loads(path.read_text())
            has_diverged = outcome is not None and "diverged" in outcome
            is_result = outcome is not None and not has_diverged
            # Every result has these; a file without them is not ours.
            if is_result and not ("report" in outcome and outcome["finetune"]["test"]):
                raise KeyError
        except (ValueError, KeyError, TypeError):
            raise damaged(path) from None
        if has_diverged and not may_diverge:
            raise run.InputError(outcome["diverged"])
        return outcome if is_result else None


def script_command(script, *flags):
    """The command line of one of the project's scripts, from whatever folder."""
    module_or_file = list(SCRIPTS[script])
    if module_or_file[0] != "-m":
        module_or_file[0] = str(ROOT / module_or_file[0])
    return [sys.executable, *module_or_file, *flags]


def unfinished(path):
    """Where tables are written: an interrupted pre-training leaves its best so far there."""
    return path.with_suffix(".part.npz")


def damaged(*paths):
    files = " and ".join(map(str, paths))
    return run.InputError(f"{files}: damaged; delete it and run the same command again")
