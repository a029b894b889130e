"""A sweep of runs on one data set: the runs it needs, what is chosen, and the text of its tables.

Every target of reproduce.py is made of these parts. A row of a table is one system or variant; it
has a cell for each seed (see cells.py).
"""
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import disk
from finetune import METRIC_NAMES
from paper import baselines, compare
from paper.cells import Cell, Cells

SYSTEMS = {"Most popular": "popular", "Random": "random", "Constant": "constant",
           "Eq. 15 alone": "mf", "CLIP": "clip", "MMGCN": "mmgcn", "GPT-GNN": "gptgnn",
           "Graph-BERT": "graphbert", "PMGT": "pmgt", "GCN-P": "gcnp", "MMCPR": "mmcpr"}
NO_CIMA = "w/o CIMA (λ = 0)"
# The systems that know no content, no graph and no review.
CONTROLS = ("Most popular", "Random", "Constant", "Eq. 15 alone")
OTHERS = tuple(method for name, method in SYSTEMS.items() if name not in (*CONTROLS, "MMCPR"))
GRID = ("1e-4", "1e-3", "1e-2")

# Flags of mmcpr.py: the recipe that the paper names.
PAPERS_RECIPE = ("--lr", "1e-3", "--weight-decay", "0", "--bias", "none")

# Flags of finetune.py: start from the tables as they are, or scaled to a random start's RMS.
AS_IS, XAVIER = (), ("--scale", "xavier")
SCALES = {"asis": AS_IS, "xavier": XAVIER}
# The tables are ranked without fine-tuning: item popularity is no start to train from.
NOT_TUNED = ("--layers", "0", "--epochs", "0")


# --- Rows of cells ------------------------------------------------------------------------

class Row(NamedTuple):
    """One system or variant: its cells, one for each seed, and what they found."""
    cells: list
    found: list


@dataclass
class Sweep:
    """The cells of a data set, and what was asked for."""
    cells: Cells
    folder: Path            # results/<data>: where tables and figures go
    label: str              # the data set's name
    seeds: list
    rates: tuple            # learning rates to choose from, as they were typed
    patience: int | None    # of mmcpr.py, in epochs; None: its default
    epochs: int | None      # of baselines.py, at most; None: its default
    settings: str           # data and feature options that are not the default, for the titles
    dataset: object         # of data.open_data
    split_seed: int         # seed 0's; those of the other seeds count on from it
    new_splits: bool        # whether seeds differ in it; not with --sample, which would draw anew
    letters: str            # the modalities that the data has, of RTVG
    shares: list            # shares of the training interactions, for `regimes`
    scales: list            # flags of finetune.py to choose from, for tables that are handed over
    systems: dict           # {name: method} of table2 and the controls

    @property
    def contents(self):
        """The letters without G."""
        return self.letters.removesuffix("G")

    @property
    def contents_alone(self):
        """The name of the row without graphs."""
        return f"Contents alone ({self.contents})"

    @property
    def has_pairs(self):
        """Whether there are both texts and images."""
        return {"T", "V"} <= set(self.letters)

    def cell(self, pretraining, finetuning, seed, data_flags=()):
        """A cell. Every seed has a split of its own, where we draw any part of the split.

        With a published split we draw the validation part, where it has none, and what --keep
        and --new-items leave out.
        """
        labels = self.dataset.labels
        is_published = labels is not None and np.any(labels == data.VALID)
        if self.new_splits and (data_flags or not is_published):
            data_flags = ("--split-seed", str(self.split_seed + seed), *data_flags)
        return Cell(pretraining, finetuning, seed, tuple(data_flags))

    def pretraining(self, system, *flags):
        """The command that makes a system's tables; None for a random start."""
        if system == "random":
            return None
        if system not in ("mmcpr", "mf"):
            if self.epochs and system not in baselines.UNTRAINED:
                flags += ("--epochs", str(self.epochs))
            return ("baselines.py", "--method", system, *flags)
        # Not for baselines.py: its patience counts steps, and keeps its default.
        if self.patience:
            flags += ("--patience", str(self.patience))
        # Matrix factorisation by the BCE of Eq. 15: tables of users and items, nothing else.
        if system == "mf":
            flags = ("--modalities", "none", *flags)
        return ("mmcpr.py", *flags)

    def run_rows(self, wanted, title, data_flags=()):
        """{name: (pretraining, finetuning)} -> {name: Row}.

        Rows that the data has nothing for are left out.
        """
        cells = []
        for pretraining, finetuning in wanted.values():
            for seed in self.seeds:
                cells.append(self.cell(pretraining, finetuning, seed, data_flags))
        found = self.cells.run(cells, title)
        rows = {}
        # The cells are in order: a row's seeds stand side by side.
        for start, name in zip(range(0, len(cells), len(self.seeds)), wanted):
            of_name = slice(start, start + len(self.seeds))
            if all(found[of_name]):
                rows[name] = Row(cells[of_name], found[of_name])
        return rows

    def show(self, name, lines):
        """Prints Markdown, and keeps it as <name>.md."""
        text = "\n".join(lines) + "\n"
        disk.write_file(self.folder / f"{name}.md", lambda file: file.write(text), "w")
        print(f"\n{text}", flush=True)


class Choice(NamedTuple):
    rate: tuple   # flags of the pre-training
    scale: tuple  # flags of finetune.py


def scales_of(sweep, command):
    """The scales, flags of finetune.py, to choose among for the tables that a command makes."""
    if command is None:
        return (AS_IS,)
    if "popular" in command:
        return (NOT_TUNED,)
    return sweep.scales


def validation_recall(outcome):
    """What a cell is chosen by; one that diverged, or had nothing to do, loses to any other."""
    return outcome["finetune"]["valid"]["recall@20"] if outcome else -1


def choose(sweep, systems):
    """{system: Choice}: the learning rate and the scale of the start, by validation."""
    return choose_variants(sweep, {system: (system,) for system in systems})


def choose_variants(sweep, variants):
    """{name: Choice} of {name: (system, flag, ...)}.

    Each name tries all pairs of a rate and a scale on the first seed and takes the pair with the
    best validation Recall@20 after fine-tuning. A system that learns nothing has no rate, and a
    random start has only one scale.
    """
    grid = []
    for name, (system, *_) in variants.items():
        rates = [("--lr", lr) for lr in sweep.rates]
        if system == "random" or system in baselines.UNTRAINED:
            rates = [()]
        for scale in scales_of(sweep, sweep.pretraining(system)):
            for rate in rates:
                grid.append((name, Choice(rate, scale)))
    cells = []
    for name, choice in grid:
        system, *flags = variants[name]
        command = sweep.pretraining(system, *choice.rate, *flags)
        cells.append(sweep.cell(command, choice.scale, sweep.seeds[0]))
    found = sweep.cells.run(cells, "learning rate and scale", may_diverge=True)
    chosen, best = {}, {}
    for (name, choice), outcome in zip(grid, found):
        recall = validation_recall(outcome)
        if name not in best or recall > best[name]:
            chosen[name], best[name] = choice, recall
    return chosen


def scale_cells(sweep, command, data_flags=()):
    """The first seed's cells of a pre-training, one for each scale to choose from."""
    return [sweep.cell(command, scale, sweep.seeds[0], data_flags)
            for scale in scales_of(sweep, command)]


def choose_scale(sweep, command, title, data_flags=()):
    """The one of scales_of with the first seed's best validation Recall@20 after fine-tuning."""
    cells = scale_cells(sweep, command, data_flags)
    found = sweep.cells.run(cells, f"{title}: scale")
    best = int(np.argmax([validation_recall(outcome) for outcome in found]))
    return cells[best].finetuning


def control_rows(sweep):
    """The rows of the controls, at the rate and scale that validation chooses for each."""
    chosen = choose(sweep, [SYSTEMS[name] for name in CONTROLS])
    wanted = {}
    for name in CONTROLS:
        choice = chosen[SYSTEMS[name]]
        wanted[name] = (sweep.pretraining(SYSTEMS[name], *choice.rate), choice.scale)
    return sweep.run_rows(wanted, "controls")


# --- The text of a table ------------------------------------------------------------------

def test_values(row, metric):
    """float [n_seeds]: one test metric."""
    return np.array([outcome["finetune"]["test"][metric] for outcome in row.found])


def mean_and_deviation(values):
    text = f"{values.mean():.4f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.4f}"
    return text


def user_table(sweep, row, metric):
    """float [n_seeds, n_users]: the metric of each user (compare.user_table)."""
    runs = [sweep.cells.per_user(cell) for cell in row.cells]
    return compare.user_table(runs, sweep.dataset.user_ids, metric)


def difference(sweep, ours, other, metric):
    """compare.Difference of two rows."""
    return compare.paired_bootstrap(user_table(sweep, ours, metric),
                                    user_table(sweep, other, metric))


def gain(sweep, ours, other, metric):
    """As "+5.1 % ± 1.2 (p = 0.002)": difference and its error, in % of the other's mean, and p."""
    found = difference(sweep, ours, other, metric)
    base = test_values(other, metric).mean()
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    return f"{100 * found.mean / base:+.1f} % ± {100 * found.error / base:.1f} ({p})"


def gains_over_mmcpr(sweep, rows, name):
    """Lines of Markdown: what a row gains over MMCPR, in Recall and NDCG."""
    lines = []
    for metric in ("recall@20", "ndcg@20"):
        text = gain(sweep, rows[name], rows["MMCPR"], metric)
        lines.append(f"- {name}, {metric}: over MMCPR, {text}")
    return lines


def smallest_difference(sweep, rows):
    """One line: the smallest difference that these users and seeds can tell from none."""
    smallest = difference(sweep, rows["MMCPR"], rows["Random"], "recall@20").smallest
    share = smallest / test_values(rows["Random"], "recall@20").mean()
    return (f"The smallest difference to Random that these users and seeds tell from none: "
            f"{smallest:.4f} of recall@20, {share:.1%}.")


def p_note(sweep):
    """The text under a table that says what ± and p mean."""
    if len(sweep.seeds) == 1:
        return ("± after a gain: the standard error of the difference, in percent of the other's "
                "mean. p: paired bootstrap over users, uncorrected; what seeds differ by is not in "
                "it.")
    return ("± after a metric: standard deviation over seeds; after a gain: the standard error of "
            "the difference, in percent of the other's mean. p: paired bootstrap over users and "
            "seeds, uncorrected.")


def best_of(rows, metric):
    """The name of the row with the highest mean."""
    return max(rows, key=lambda name: test_values(rows[name], metric).mean())


def title_of(sweep, name, rates=GRID):
    """A table's title, with what is not the default. rates: those the table chooses from."""
    title = f"# {name}, {sweep.label}, seeds {' '.join(map(str, sweep.seeds))}"
    if tuple(rates) != GRID:
        title += f", rates {' '.join(rates)}"
    if sweep.patience:
        title += f", patience {sweep.patience}"
    if sweep.epochs:
        title += f", at most {sweep.epochs:,} epochs of the other systems"
    if len(sweep.scales) == 1:
        title += f", scale {scale_name(sweep.scales[0])}"
    return title + sweep.settings


def table(sweep, name, rows, columns=None):
    """Lines of Markdown of {name: Row}.

    columns: {title of a column beside the metrics: {row: text}}.
    """
    return [title_of(sweep, name, sweep.rates), "", *table_lines(rows, columns)]


def table_lines(rows, columns=None):
    """The same without the title."""
    columns = columns or {}
    names = [*METRIC_NAMES, *columns]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for name, row in rows.items():
        texts = [name]
        for metric in METRIC_NAMES:
            texts.append(mean_and_deviation(test_values(row, metric)))
        for column in columns.values():
            texts.append(column.get(name, ""))
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def scale_name(finetuning, is_random=False):
    if finetuning == NOT_TUNED:
        return "not tuned"
    if finetuning == AS_IS:
        return "Xavier's" if is_random else "as is"
    return "Xavier's" if finetuning == XAVIER else f"RMS {finetuning[1]}"


def choice_columns(rows):
    """Columns of a table: each row's learning rate, where it was given one, and its scale."""
    rates, scales = {}, {}
    for name, row in rows.items():
        cell = row.cells[0]
        command = cell.pretraining or ()
        rates[name] = command[command.index("--lr") + 1] if "--lr" in command else ""
        scales[name] = scale_name(cell.finetuning, cell.pretraining is None)
    return {"lr": rates, "scale": scales}


def rms(row):
    """The RMS of the tables as they were handed over, of the first seed."""
    return f"{row.found[0]['report']['rms']['all']:.4g}"


def write_runs(path, used):
    """<target>.csv of {Cell: what it found}: the runs behind a table."""
    header = ["pretraining", "finetuning", "data", "seed", "epoch", "valid recall@20",
              *METRIC_NAMES]
    rows = []
    for cell, found in used.items():
        if found is None:
            continue
        result = found["finetune"]
        row = [" ".join(cell.pretraining or ("random",)),
               " ".join(("finetune.py", *cell.finetuning)), " ".join(cell.data), cell.seed,
               result["epoch"], f"{result['valid']['recall@20']:.6f}"]
        for metric in METRIC_NAMES:
            row.append(f"{result['test'][metric]:.6f}")
        rows.append(row)

    def write(file):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    disk.write_file(path, write, "w")
