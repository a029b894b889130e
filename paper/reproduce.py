"""Every table and figure of the paper.

    python -m paper.reproduce table2 --data demo --seeds 0 1 2 3 4

    table1    counts of the data set
    table2    all systems of baselines.py beside MMCPR
    table3    MMCPR without CIMA, without BCE
    fig3      subsets of the modalities
    fig4      the loss weight, both readings of CIMA
    scale     what share is only scale and smoothing
    all       all of them

A cell is one pre-training and one fine-tuning, by the commands a reader would type. What it found
is kept as JSON in paper/results/<data>/cells, so an interrupted sweep goes on and a second call
only prints. A cell is named after all options of its commands, the split and the features, but
not after the code: after a change of that, name another --results. <target>.csv lists the runs
behind a table, those of the choice too.

Pre-training is repeated for every seed, the split stays. Each system's learning rate, of the
paper's grid, and the scale at which its tables are handed over, as they are or Xavier's, are
chosen on the first seed by the validation Recall@20 after fine-tuning. Variants of MMCPR keep
MMCPR's.
"""
import argparse
import contextlib
import csv
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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import run  # before the libraries: from here on Ctrl-C ends in one line

import numpy as np
from scipy import stats
from tqdm import tqdm

import data
import finetune
import mmcpr
from paper import baselines

ROOT = Path(__file__).resolve().parent.parent

# What Python is given to run a script, and the module that knows the script's options.
SCRIPTS = {"mmcpr.py": ["mmcpr.py"], "finetune.py": ["finetune.py"],
           "baselines.py": ["-m", "paper.baselines"]}
MODULES = {"mmcpr.py": mmcpr, "finetune.py": finetune, "baselines.py": baselines}

SYSTEMS = {"Random": "random", "CLIP": "clip", "MMGCN": "mmgcn", "GPT-GNN": "gptgnn",
           "Graph-BERT": "graphbert", "PMGT": "pmgt", "GCN-P": "gcnp", "MMCPR": "mmcpr"}
GRID = ("1e-4", "1e-3", "1e-2")

# Flags of finetune.py: the tables to start from as they are, or brought to a random start's RMS.
AS_IS, XAVIER = (), ("--scale", "xavier")

# Flags of mmcpr.py that leave the towers as they are drawn.
UNTRAINED = ("--lr", "1e-9", "--epochs", "1", "--eval-every", "1")

METRICS = ("recall@20", "recall@40", "recall@60", "ndcg@20", "ndcg@40", "ndcg@60")
ENCODING = ("encoder", "clip_model", "clip_weights")
P_VALUE = "p: paired t-test over the seeds of one split, uncorrected."

# Recall@20 of the paper's Table 2, in the order of SYSTEMS, and of its Table 3.
PAPER = {"vg": (.1571, .1712, .1703, .1659, .1696, .1718, .1916, .1939),
         "tg": (.0876, .0967, .0966, .0931, .1034, .1024, .1025, .1067),
         "sharee": (.1059, .1135, .1106, .1090, .1074, .1077, .1382, .1392)}
PAPER_ABLATION = {"vg": (.1898, .1729, .1939), "tg": (.1051, .0974, .1067),
                  "sharee": (.1316, .1143, .1392)}

# What the scripts say where the data has nothing for a cell, and where a learning rate is too
# high.
NOTHING = ("nothing for --method", "--lam 1 trains CIMA alone")
DIVERGED = "not finite"


# --- Scripts, several at a time -----------------------------------------------------------

class Script(NamedTuple):
    """A script that is running, and the file that takes what it says on stderr."""
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
    # In a session of its own a script does not hear the terminal's Ctrl-C: it is told once, by
    # us.
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=messages,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None)
    return Script(process, messages)


def error_of(script):
    """None where a script that has ended did well, else what it said."""
    script.messages.seek(0)
    lines = script.messages.read().strip().splitlines()
    script.messages.close()
    code = script.process.returncode
    if code == 0:
        return None
    for line in reversed(lines):
        # The scripts' own line, or that of a traceback.
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

    # A signal's own doing would be an exception, in the middle of whatever is going on.
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_side_by_side(commands, jobs, keep, title, folder):
    """Runs {key: command}, `jobs` at a time, in `folder`; calls keep(key, error) as each ends.

    Where keep raises an InputError nothing more is started, but what is running beside it
    finishes. At Ctrl-C or SIGTERM nothing more is started either, and what is running gets
    SIGTERM: mmcpr.py and finetune.py save a checkpoint. Where this process dies of kill -9, its
    scripts end too on Linux; elsewhere they finish what they are at.
    """
    waiting = list(commands.items())
    running = {}
    failure = None
    with noted_signals() as signals:
        bar = tqdm(total=len(commands), desc=title, unit="run", disable=not commands)
        try:
            while running or (waiting and failure is None):
                # As many as may run side by side, in order.
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
                # What has ended is kept before anything else is started, also after a signal.
                for key in list(running):
                    if running[key].process.poll() is None:
                        continue
                    try:
                        keep(key, error_of(running.pop(key)))
                    except (run.InputError, OSError) as error:
                        # The failure that came first is the one to tell.
                        failure = failure or error
                    bar.update()
        finally:
            # Empty, but where something went wrong in here.
            for script in running.values():
                script.process.terminate()
            bar.close()
    # Only now, when nothing is running any more.
    if failure is not None:
        raise failure


# --- Cells --------------------------------------------------------------------------------

class Cell(NamedTuple):
    """One run of Table 2 and the others."""
    pretraining: tuple | None  # of mmcpr.py or baselines.py and its flags; None: a random start
    finetuning: tuple          # flags of finetune.py
    seed: int


def name_of(parts):
    """Sixteen hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Cells:
    """Runs the cells that are missing, and keeps what they found."""

    def __init__(self, data_flags, encoding_flags, fingerprint, folder, jobs):
        """The flags say which data and features, the same for all cells; fingerprint: of these;
        folder: results/<data>; jobs: how many scripts to run at a time."""
        self.data_flags, self.encoding_flags = data_flags, encoding_flags
        self.fingerprint, self.jobs = fingerprint, jobs
        self.folder = folder.resolve()
        self.cells_folder = self.folder / "cells"
        self.tables_folder = self.folder / "tables"
        self.cells_folder.mkdir(parents=True, exist_ok=True)
        self.tables_folder.mkdir(parents=True, exist_ok=True)
        for used_folder in (self.folder, self.cells_folder, self.tables_folder):
            run.remove_leftovers(used_folder)
        self.parsers = {script: module.arguments() for script, module in MODULES.items()}
        self.used = {}  # what the present target has asked for

    def all_options(self, script, *flags):
        """All options of a command, defaults too, but for what names data and device."""
        options = {}
        for name, value in vars(self.parsers[script].parse_args(flags)).items():
            # A data set is told by its fingerprint, so it may move. A device changes no result.
            if not name.startswith(("data", "device")):
                options[name] = value
        return [script, options]

    def cell_path(self, cell):
        """Where what the cell found is kept: JSON, null where the data has nothing for it."""
        before = self.all_options(*cell.pretraining) if cell.pretraining else None
        after = self.all_options("finetune.py", *cell.finetuning)
        name = name_of([self.fingerprint, cell.seed, before, after])
        return self.cells_folder / f"{name}.json"

    def table_path(self, cell):
        """Where the tables that the cell starts from are kept."""
        name = name_of([self.fingerprint, cell.seed, self.all_options(*cell.pretraining)])
        return self.tables_folder / f"{name}.npz"

    def run(self, cells, title, may_diverge=False):
        """What the cells found, in order; those that are missing are run.

        A dict for each cell, and None where the data has nothing for it. Also, if may_diverge,
        where the learning rate is too high for it; else InputError.
        """
        found, missing = {}, []
        # Each once, in order. A damaged or diverged one is told before anything is run.
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
        """Runs the pre-trainings whose tables are missing, each once, whatever cells share it."""
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
                # Only what has come to its end gets its name.
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
            # Read before the run, so that damaged tables are told at once.
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
        command += [*self.data_flags, *self.encoding_flags, "--seed", str(cell.seed)]
        command += ["--out", str(unfinished(self.table_path(cell)))]
        if cell.pretraining[0] == "mmcpr.py":
            # An interrupted one goes on; baselines.py keeps no checkpoint and starts anew.
            command.append("--resume")
        return command

    def finetuning_command(self, cell):
        init = str(self.table_path(cell)) if cell.pretraining else "random"
        command = script_command("finetune.py", *cell.finetuning)
        command += [*self.data_flags, "--init", init, "--seeds", str(cell.seed)]
        command += ["--metrics", str(self.metrics_path(cell)), "--resume"]
        return command

    def metrics_path(self, cell):
        """Where finetune.py writes, before the cell is kept."""
        return self.cell_path(cell).with_suffix(".metrics")

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
        run.write_file(self.cell_path(cell), write_json, "w")

    def read(self, cell, may_diverge):
        """What run returns for a cell that is there."""
        path = self.cell_path(cell)
        try:
            outcome = json.loads(path.read_text())
            has_diverged = outcome is not None and "diverged" in outcome
            is_result = outcome is not None and not has_diverged
            # What a result must have; anything else is no file of ours.
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


def damaged(path):
    return run.InputError(f"{path}: damaged; delete it and run the same command again")


# --- What every target needs --------------------------------------------------------------

@dataclass
class Sweep:
    """The cells of a data set, and what was asked for."""
    cells: Cells
    folder: Path            # results/<data>: where tables and figures go
    label: str              # the data set's name
    seeds: list
    rates: tuple            # learning rates to choose from, as they were typed
    patience: int | None    # of every pre-training; None: the scripts' own
    settings: str           # what of data and features is not the default, for the titles
    dataset: object         # as data.open_data returns it
    has_pairs: bool         # whether there are both texts and images

    def run_rows(self, wanted, title):
        """{row: (pretraining, finetuning)} -> {row: [a found cell for each seed]}.

        Without the rows that the data has nothing for.
        """
        cells = []
        for pretraining, finetuning in wanted.values():
            for seed in self.seeds:
                cells.append(Cell(pretraining, finetuning, seed))
        found = self.cells.run(cells, title)
        rows = {}
        # The cells are in order: a row's seeds stand side by side.
        for name in wanted:
            of_row, found = found[:len(self.seeds)], found[len(self.seeds):]
            if all(of_row):
                rows[name] = of_row
        return rows

    def show(self, name, lines):
        """Prints Markdown, and keeps it as <name>.md."""
        text = "\n".join(lines) + "\n"
        run.write_file(self.folder / f"{name}.md", lambda file: file.write(text), "w")
        print(f"\n{text}", flush=True)


class Choice(NamedTuple):
    rate: tuple   # flags of the pre-training
    scale: tuple  # flags of finetune.py


def pretraining(system, *flags):
    """The command that makes a system's tables; None for a random start."""
    if system == "random":
        return None
    if system == "mmcpr":
        return ("mmcpr.py", *flags)
    return ("baselines.py", "--method", system, *flags)


def choose(sweep, systems):
    """{system: Choice}: the learning rate and the scale of the start, by validation.

    Of all pairs the one with the best validation Recall@20 after fine-tuning, on the first seed.
    What learns nothing has no rate, and a random start no other scale.
    """
    # Where it is not given the scripts keep their own.
    patience = ("--patience", str(sweep.patience)) if sweep.patience else ()
    grid = []
    for scale in (AS_IS, XAVIER):
        for system in systems:
            if system == "random" and scale != AS_IS:
                continue
            if system in ("random", "clip"):
                grid.append((system, Choice((), scale)))
                continue
            for lr in sweep.rates:
                grid.append((system, Choice(("--lr", lr, *patience), scale)))
    cells = []
    for system, choice in grid:
        command = pretraining(system, *choice.rate)
        cells.append(Cell(command, choice.scale, sweep.seeds[0]))
    found = sweep.cells.run(cells, "learning rate and scale", may_diverge=True)
    chosen, best = {}, {}
    for (system, choice), cell in zip(grid, found):
        # What diverged, or has nothing to do, loses to anything.
        recall = cell["finetune"]["valid"]["recall@20"] if cell else -1
        if system not in best or recall > best[system]:
            chosen[system], best[system] = choice, recall
    return chosen


# --- The text of a table ------------------------------------------------------------------

def test_values(cells, metric):
    """float [n_seeds]: one test metric."""
    return np.array([cell["finetune"]["test"][metric] for cell in cells])


def mean_and_deviation(values):
    text = f"{values.mean():.4f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.4f}"
    return text


def gain(ours, other):
    """The relative gain, with the p-value of a paired t-test over seeds."""
    text = f"{ours.mean() / other.mean() - 1:+.1%}"
    # The test divides by the spread of the differences.
    is_constant = np.ptp(ours - other) < 1e-9
    if len(ours) < 2 or is_constant:
        return text
    p = stats.ttest_rel(ours, other).pvalue
    return f"{text} (p < 0.001)" if p < 0.001 else f"{text} (p = {p:.3f})"


def title_of(sweep, name):
    """A table's title; it names what is not the default."""
    title = f"# {name}, {sweep.label}, seeds {' '.join(map(str, sweep.seeds))}"
    if tuple(sweep.rates) != GRID:
        title += f", rates {' '.join(sweep.rates)}"
    if sweep.patience:
        title += f", patience {sweep.patience}"
    return title + sweep.settings


def table(sweep, name, rows, columns=None):
    """Lines of Markdown of rows {name: its cells}.

    columns: {title of a column beside the metrics: {row: text}}.
    """
    columns = columns or {}
    names = [*METRICS, *columns]
    lines = [title_of(sweep, name), "", "| | " + " | ".join(names) + " |",
             "|---" * (1 + len(names)) + "|"]
    for row, cells in rows.items():
        texts = [row]
        for metric in METRICS:
            texts.append(mean_and_deviation(test_values(cells, metric)))
        for column in columns.values():
            texts.append(column.get(row, ""))
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def paper_column(names, values):
    """The column of the paper's Recall@20; none where the paper does not have the data set."""
    if values is None:
        return {}
    column = {}
    for name, value in zip(names, values):
        column[name] = f"{value:.4f}"
    return {"paper, recall@20": column}


def rms(cells):
    """The RMS of the tables as they were handed over, of the first seed."""
    return f"{cells[0]['report']['rms']['all']:.4g}"


def write_runs(path, used):
    """<target>.csv of {Cell: what it found}: what a paired comparison needs."""
    header = ["pretraining", "finetuning", "seed", "epoch", "valid recall@20", *METRICS]
    rows = []
    for cell, found in used.items():
        if found is None:
            continue
        result = found["finetune"]
        row = [" ".join(cell.pretraining or ("random",)),
               " ".join(("finetune.py", *cell.finetuning)), cell.seed, result["epoch"],
               f"{result['valid']['recall@20']:.6f}"]
        for metric in METRICS:
            row.append(f"{result['test'][metric]:.6f}")
        rows.append(row)

    def write(file):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    run.write_file(path, write, "w")


# --- Tables -------------------------------------------------------------------------------

def table1(sweep):
    n_users, n_items = sweep.dataset.n_users, sweep.dataset.n_items
    n = len(sweep.dataset.users)
    sparsity = 1 - n / n_users / n_items
    sweep.show("table1", [
        f"# Table 1{sweep.settings}", "",
        "| data | users | items | interactions | sparsity |", "|---|---|---|---|---|",
        f"| {sweep.label} | {n_users:,} | {n_items:,} | {n:,} | {sparsity:.2%} |"])


def table2(sweep):
    chosen = choose(sweep, SYSTEMS.values())
    wanted = {}
    for name, system in SYSTEMS.items():
        choice = chosen[system]
        wanted[name] = (pretraining(system, *choice.rate), choice.scale)
    found = sweep.run_rows(wanted, "table 2")

    # The system behind each row; vectors that are not CLIP's do not stand under its name.
    rows, systems = {}, {}
    for name, cells in found.items():
        if name == "CLIP" and cells[0]["report"]["method"] == "text+image":
            systems["text+image"], rows["text+image"] = "clip", cells
        else:
            systems[name], rows[name] = SYSTEMS[name], cells
    ours = {"MMCPR": rows.pop("MMCPR")}
    others = rows

    # A random start with larger rows is no weaker than one with smaller rows.
    at_our_rms = "Random at the RMS of MMCPR as is"
    wanted = {at_our_rms: (None, ("--scale", rms(ours["MMCPR"])))}
    rescaled = sweep.run_rows(wanted, "Random at MMCPR's RMS")

    # Of the other systems only GCN-P reads reviews.
    if "R" in ours["MMCPR"][0]["report"]["attention"]["user"]:
        name, choice = "MMCPR without reviews", chosen["mmcpr"]
        command = pretraining("mmcpr", *choice.rate, "--modalities", "TVG")
        without = sweep.run_rows({name: (command, choice.scale)}, "without reviews")
        ours = without | ours
        systems[name] = "mmcpr"

    rows = {"Random": others["Random"]} | rescaled | others | ours
    lines = table(sweep, "Table 2", rows, table2_columns(sweep, rows, systems, chosen))
    lines.append("")
    for name, cells in ours.items():
        for metric in ("recall@20", "ndcg@20"):
            lines.append(comparison(name, cells, others, metric))
    lines += ["", f"{P_VALUE} The best other is the best on test. users: where a system brings "
                  "none, fine-tuning starts them at random."]
    sweep.show("table2", lines)


def table2_columns(sweep, rows, systems, chosen):
    """Whose users each row starts from, what validation chose for it, and the paper's value."""
    users, rates, scales = {}, {}, {}
    for name, cells in rows.items():
        report = cells[0]["report"]
        users[name] = "its own" if report and "user" in report["rms"] else "random"
    for name, system in systems.items():
        choice = chosen[system]
        rates[name] = choice.rate[1] if choice.rate else ""
        scales[name] = "Xavier's" if choice.scale or system == "random" else "as is"
    columns = {"users": users, "lr": rates, "scale": scales}
    return columns | paper_column(SYSTEMS, PAPER.get(sweep.label))


def comparison(name, cells, others, metric):
    """One line: a row against Random and against the best of the others."""
    means = {}
    for other, of_other in others.items():
        means[other] = test_values(of_other, metric).mean()
    best = max(means, key=means.get)
    value = test_values(cells, metric)
    over_random = gain(value, test_values(others["Random"], metric))
    over_best = gain(value, test_values(others[best], metric))
    return (f"- {name}, {metric}: over Random {over_random}; "
            f"over the best other, {best}, {over_best}")


def table3(sweep):
    choice = choose(sweep, ["mmcpr"])["mmcpr"]
    variants = {"w/o CIMA (λ = 0)": ("--lam", "0"), "w/o BCE (λ = 1)": ("--lam", "1"),
                "MMCPR": ()}
    wanted = {}
    for name, flags in variants.items():
        # Without items that have both text and image there is no CIMA to leave out.
        if sweep.has_pairs or name == "MMCPR":
            wanted[name] = (pretraining("mmcpr", *choice.rate, *flags), choice.scale)
    rows = sweep.run_rows(wanted, "table 3")
    columns = {}
    for metric in ("recall@20", "ndcg@20"):
        ours = test_values(rows["MMCPR"], metric)
        gains = {}
        for name, cells in rows.items():
            if name != "MMCPR":
                gains[name] = gain(test_values(cells, metric), ours)
        columns[f"{metric} against MMCPR"] = gains
    columns |= paper_column(variants, PAPER_ABLATION.get(sweep.label))
    sweep.show("table3", [*table(sweep, "Table 3", rows, columns), "", P_VALUE])


def scale_of_start(sweep):
    """What is left of the gain where both starts have one scale, or the towers no training.

    Not trained, they still hand over averages over co-interaction neighbours and projected
    contents, and not noise.
    """
    rate = choose(sweep, ["mmcpr"])["mmcpr"].rate
    ours = pretraining("mmcpr", *rate)
    wanted = {"MMCPR, as is": (ours, AS_IS), "MMCPR, to Xavier's RMS": (ours, XAVIER)}
    if sweep.has_pairs:
        without = pretraining("mmcpr", *rate, "--lam", "0")
        wanted["w/o CIMA, as is"] = (without, AS_IS)
        wanted["w/o CIMA, to Xavier's RMS"] = (without, XAVIER)
    wanted["MMCPR not trained, to Xavier's RMS"] = (pretraining("mmcpr", *UNTRAINED), XAVIER)
    wanted["Random, Xavier"] = (None, AS_IS)
    rows = sweep.run_rows(wanted, "scale")
    our_rms = ("--scale", rms(rows["MMCPR, as is"]))
    rows |= sweep.run_rows({"Random, at the RMS of MMCPR as is": (None, our_rms)}, "scale")
    sweep.show("scale", table(sweep, "Scale of the start", rows))
    # The curves without the ablation: they would hide each other.
    curves = {}
    for name, cells in rows.items():
        if "CIMA" not in name:
            histories = [cell["finetune"]["history"] for cell in cells]
            curves[name] = curve(histories, "recall@20")
    panels = {"validation Recall@20": curves}
    plot(sweep.folder / "scale.png", panels, draw_lines, "epoch of fine-tuning")


# --- Figures ------------------------------------------------------------------------------

def curve(histories, key):
    """(epochs, values: per epoch one of each seed), as far as all seeds go."""
    epochs, values = [], []
    for points in zip(*histories):
        epochs.append(points[0]["epoch"])
        values.append([point[key] for point in points])
    return epochs, values


def means_and_bars(values):
    """(means, keyword arguments of matplotlib's error bars) of the seeds' values per x."""
    means = [np.mean(of_seeds) for of_seeds in values]
    if not values or len(values[0]) < 2:
        return means, {}
    deviations = [np.std(of_seeds, ddof=1) for of_seeds in values]
    return means, {"yerr": deviations, "capsize": 3}


def draw_bars(axis, curves):
    for names, values in curves.values():
        means, error_bars = means_and_bars(values)
        axis.bar(names, means, **error_bars)
        # Bars that start at 0 would all look the same.
        axis.set_ylim(0.9 * min(means))  # as the paper cuts its bars


def draw_points(axis, curves):
    """A point for every seed: they may fall on either side of a mean."""
    for modality, (names, values) in curves.items():
        color = f"C{'RTVG'.index(modality)}"
        x = np.repeat(names, [len(of_seeds) for of_seeds in values])
        axis.plot(x, np.concatenate(values), "o", label=modality, color=color)


def draw_lines(axis, curves):
    for label, (x, values) in curves.items():
        means, error_bars = means_and_bars(values)
        marker = "o" if len(x) < 20 else ""
        axis.errorbar(x, means, marker=marker, label=label, **error_bars)


def plot(path, panels, draw, xlabel=""):
    """A PNG with one panel per entry of {title: {curve: (x, per x one value of each seed)}}."""
    # Imported here: it takes a second, and most calls plot nothing.
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    size = (5 * len(panels), 3.6)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        draw(axis, curves)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    figure.tight_layout()
    run.write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def fig3(sweep):
    choice = choose(sweep, ["mmcpr"])["mmcpr"]
    command = pretraining("mmcpr", *choice.rate)
    # The modalities that this data has are those with attention where all are asked for.
    full = sweep.cells.run([Cell(command, choice.scale, sweep.seeds[0])], "figure 3")[0]
    present = set()
    for attention in full["report"]["attention"].values():
        present |= set(attention)
    wanted = {}
    for subset in ("T", "V", "R", "G", "TV", "TG", "VG", "RG", "TVG", "RTVG"):
        if set(subset) == present:
            wanted[subset] = (command, choice.scale)  # all that there is: the cells of Table 2
        elif set(subset) < present:
            wanted[subset] = ((*command, "--modalities", subset), choice.scale)
    rows = sweep.run_rows(wanted, "figure 3")
    column = {subset: attention_text(cells) for subset, cells in rows.items()}
    lines = table(sweep, "Figure 3", rows, {"mean attention where present": column})
    lines += ["", "A side that a subset leaves with nothing (users under T, V, TV; items under "
                  "R) has a trained table instead."]
    sweep.show("fig3", lines)
    plot_subsets(sweep.folder / "fig3.png", rows)
    plot_attention(sweep.folder / "attention.png", rows)
    plot_training(sweep.folder / "training.png", rows)


def attention_of(cells, side):
    """{modality: its mean attention, one value of each seed}; side: "user" or "item"."""
    values = {}
    for modality in cells[0]["report"]["attention"][side]:
        values[modality] = [cell["report"]["attention"][side][modality] for cell in cells]
    return values


def attention_text(cells):
    """As "user R 0.40 G 0.60; item T 0.30 G 0.70": the means over seeds."""
    texts = []
    for side in ("user", "item"):
        words = [side]
        for modality, values in attention_of(cells, side).items():
            words.append(f"{modality} {np.mean(values):.2f}")
        if len(words) > 1:
            texts.append(" ".join(words))
    return "; ".join(texts)


def plot_subsets(path, rows):
    panels = {}
    for metric in ("recall@20", "ndcg@20"):
        values = [test_values(cells, metric) for cells in rows.values()]
        panels[metric] = {"MMCPR": (list(rows), values)}
    plot(path, panels, draw_bars)


def plot_attention(path, rows):
    panels = {}
    for side in ("user", "item"):
        shown = {}
        for subset, cells in rows.items():
            attention = attention_of(cells, side)
            if attention:
                shown[subset] = attention
        curves = {}
        for modality in "RTVG":
            if any(modality in attention for attention in shown.values()):
                values = [attention.get(modality, [np.nan]) for attention in shown.values()]
                curves[modality] = (list(shown), values)
        if curves:
            panels[f"mean attention, {side}s"] = curves
    plot(path, panels, draw_points)


def plot_training(path, rows):
    """The pre-training of the first seed: single modalities, and three or more."""
    panels = {}
    for title, key in (("loss per positive (BCE)", "bce"), ("validation Recall@20", "recall@20")):
        curves = {}
        for subset, cells in rows.items():
            if len(subset) != 2:
                curves[subset] = curve([cells[0]["report"]["history"]], key)
        panels[title] = curves
    plot(path, panels, draw_lines, "epoch")


def fig4(sweep):
    if not sweep.has_pairs:
        print("figure 4: no items with both text and image, so CIMA and its weight do nothing")
        return
    choice = choose(sweep, ["mmcpr"])["mmcpr"]
    wanted, points = {}, {}
    for reading in ("softmax", "bce"):
        for lam in ("0", "0.2", "0.4", "0.6", "0.8", "1"):
            # Without CIMA its reading does not matter: both curves start from the same cell.
            # The default is not spelt out, so that it is the cells of Table 2.
            flags = () if lam == "0.2" else ("--lam", lam)
            if reading == "bce" and lam != "0":
                flags += ("--cima", "bce")
            name = f"{reading}, λ = {lam}"
            wanted[name] = (pretraining("mmcpr", *choice.rate, *flags), choice.scale)
            points[name] = (reading, float(lam))
    rows = sweep.run_rows(wanted, "figure 4")
    column = {}
    for name, cells in rows.items():
        if points[name][1] < 1:  # else there is no BCE
            column[name] = f"{np.mean([bce_share(cell) for cell in cells]):.2f}"
    columns = {"BCE, of that of popularity alone": column}
    sweep.show("fig4", table(sweep, "Figure 4", rows, columns))
    panels = {}
    for metric in ("recall@20", "ndcg@20"):
        curves = {"softmax": ([], []), "bce": ([], [])}
        for name, cells in rows.items():
            reading, lam = points[name]
            weights, values = curves[reading]
            weights.append(lam)
            values.append(test_values(cells, metric))
        panels[metric] = curves
    plot(sweep.folder / "fig4.png", panels, draw_lines, "λ")


def bce_share(cell):
    """The BCE reached, of that of item popularity alone."""
    return cell["report"]["losses"]["bce"] / cell["report"]["popularity_loss"]


# --- The command line ---------------------------------------------------------------------

TARGETS = {"table1": table1, "table2": table2, "table3": table3, "fig3": fig3, "fig4": fig4,
           "scale": scale_of_start}


def rate(text):
    """argparse type: a learning rate, as it was written."""
    if not 0 < float(text) < np.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return text


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m paper.reproduce", formatter_class=run.Help,
        description="Make the paper's tables and figures.")
    parser.add_argument("target", choices=(*TARGETS, "all"))
    parser.add_argument("--seeds", type=run.non_negative, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=rate, nargs="+", default=GRID,
                        help="learning rates to choose from; the default is the paper's grid")
    parser.add_argument("--patience", type=run.positive,
                        help="of every pre-training, in epochs; the default is the scripts' own")
    parser.add_argument("--jobs", type=run.positive, default=1,
                        help="scripts at a time; they share the cores")
    parser.add_argument("--results", default="paper/results",
                        help="where tables, figures and cells are kept")
    data.add_data_arguments(parser)
    data.add_feature_arguments(parser)
    return parser


def check_arguments(args):
    if len(set(args.seeds)) < len(args.seeds):
        raise run.InputError("--seeds names one twice")
    if len(set(map(float, args.rates))) < len(args.rates):
        raise run.InputError("--rates names one twice")
    if args.valid == 0:
        raise run.InputError("--valid 0 leaves nothing to choose learning rate and scale by")


def as_flags(options):
    """{"min_count": 5} -> ["--min-count=5"]; None is a flag that is not given."""
    flags = []
    for name, value in options.items():
        if value is not None:
            flags.append(f"--{name.replace('_', '-')}={value}")
    return flags


def changed_settings(args, data_options):
    """What of data and features is not the default, as it stands in the titles."""
    text = ""
    for name, default in data.DATA_DEFAULTS.items():
        # The data's name stands in the title anyway, and where it lies does not matter.
        if name not in ("data", "data_dir") and data_options[name] != default:
            text += f", {name.replace('_', ' ')} {data_options[name]}"
    for name in ENCODING:
        if getattr(args, name) != arguments().get_default(name):
            text += f", {name.replace('_', ' ')} {getattr(args, name)}"
    return text


def open_sweep(args):
    """Opens the data and encodes it once, before the cells ask for it."""
    dataset, parts, data_options = data.open_data(args)
    label = os.path.basename(data_options["data"]).replace(":", "_")
    folder = Path(args.results) / label
    settings = changed_settings(args, data_options)
    run.check_outputs([folder / "table1.md"])
    if os.path.exists(args.clip_weights):
        # The scripts run in another folder.
        args.clip_weights = os.path.abspath(args.clip_weights)
    features = data.features(dataset, "TVR", args.encoder, Path(data_options["data_dir"]),
                             (args.clip_model, args.clip_weights), "cpu")
    data_flags = as_flags(data_options | {"amazon_url": args.amazon_url})
    encoding_flags = as_flags({name: getattr(args, name) for name in ENCODING})
    # Of the split and the features: cells of other data have other names.
    fingerprint = run.run_id({}, parts, features.values())
    cells = Cells(data_flags, encoding_flags, fingerprint, folder, args.jobs)
    has_pairs = "T" in features and "V" in features
    return Sweep(cells, folder, label, args.seeds, args.rates, args.patience, settings, dataset,
                 has_pairs)


def main(argv=None):
    args = arguments().parse_args(argv)
    check_arguments(args)
    sweep = open_sweep(args)
    # A target's .csv lists the runs that it has asked for.
    for name in TARGETS if args.target == "all" else [args.target]:
        sweep.cells.used.clear()
        TARGETS[name](sweep)
        if sweep.cells.used:
            write_runs(sweep.folder / f"{name}.csv", sweep.cells.used)
    again = "" if args.target == "all" else "; next: python -m paper.reproduce all"
    if again and args.data:
        again += f" --data {args.data}"
    print(f"wrote {sweep.folder}{again}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run.cli(main))
