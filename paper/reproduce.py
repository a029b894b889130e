"""Every table and figure of the paper, and the map of when pre-training pays.

    python -m paper.reproduce table2 --data demo --seeds 0 1 2

    table1      counts of the data set
    table2      the systems of baselines.py and the controls beside MMCPR
    table3      MMCPR without CIMA, without BCE
    fig3        subsets of the modalities
    fig4        the loss weight, both readings of CIMA
    scale       what share is only scale and smoothing
    regimes     the map: how each gain fades as training data grows, and who gains
    new-items   items without any training interaction
    all         all of them

A cell, one pre-training and one fine-tuning, is kept in paper/results/<data>/cells (see cells.py).
<target>.csv lists the runs behind a table, those of the choice too.

Pre-training is repeated for every seed, and so is the split where it is ours: seed 1 has split
seed 1. Each system's learning rate, of the paper's grid, and the scale at which its tables are
handed over, as they are or Xavier's, are chosen on the first seed by the validation Recall@20
after fine-tuning. Variants of MMCPR keep MMCPR's; `regimes` and `new-items` choose the scale alone.
"""
import argparse
import csv
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import run  # before the libraries: from here on Ctrl-C ends in one line

import numpy as np

import data
from paper import compare
from paper.cells import Cell, Cells

SYSTEMS = {"Most popular": "popular", "Random": "random", "Constant": "constant",
           "Eq. 15 alone": "mf", "CLIP": "clip", "MMGCN": "mmgcn", "GPT-GNN": "gptgnn",
           "Graph-BERT": "graphbert", "PMGT": "pmgt", "GCN-P": "gcnp", "MMCPR": "mmcpr"}
# What knows no content, no graph and no review.
CONTROLS = ("Most popular", "Random", "Constant", "Eq. 15 alone")
OTHERS = tuple(method for name, method in SYSTEMS.items() if name not in (*CONTROLS, "MMCPR"))
GRID = ("1e-4", "1e-3", "1e-2")

# Flags of finetune.py: the tables to start from as they are, or brought to a random start's RMS.
AS_IS, XAVIER = (), ("--scale", "xavier")
SCALES = {"asis": AS_IS, "xavier": XAVIER}
# The tables themselves are ranked: a popularity is no start.
NOT_TUNED = ("--layers", "0", "--epochs", "0")

# Flags of mmcpr.py that leave the towers as they are drawn.
UNTRAINED = ("--lr", "1e-9", "--epochs", "1", "--eval-every", "1")

METRICS = ("recall@20", "recall@40", "recall@60", "ndcg@20", "ndcg@40", "ndcg@60")
ENCODING = ("encoder", "clip_model", "clip_weights")
P_VALUE = ("±: standard error of the difference, in percent of the other's mean. p: paired "
           "bootstrap over users and seeds, uncorrected.")

# Flags of mmcpr.py: the recipe that the paper names.
THE_PAPERS = ("--lr", "1e-3", "--weight-decay", "0", "--bias", "none")

# Recall@20 of the paper's Table 2 and 3.
PAPER_SYSTEMS = ("Random", "CLIP", "MMGCN", "GPT-GNN", "Graph-BERT", "PMGT", "GCN-P", "MMCPR")
PAPER = {"vg": (.1571, .1712, .1703, .1659, .1696, .1718, .1916, .1939),
         "tg": (.0876, .0967, .0966, .0931, .1034, .1024, .1025, .1067),
         "sharee": (.1059, .1135, .1106, .1090, .1074, .1077, .1382, .1392)}
PAPER_ABLATION = {"vg": (.1898, .1729, .1939), "tg": (.1051, .0974, .1067),
                  "sharee": (.1316, .1143, .1392)}


# --- What every target needs --------------------------------------------------------------

class Row(NamedTuple):
    """One system or variant: its cells, a seed each, and what they found."""
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
    patience: int | None    # of mmcpr.py, in epochs; None: its own
    settings: str           # what of data and features is not the default, for the titles
    dataset: object         # as data.open_data returns it
    split_seed: int         # of the first seed's split
    new_splits: bool        # whether the other seeds have other ones
    letters: str            # the modalities that the data has, of RTVG
    shares: list            # of the training interactions, of `regimes`
    scales: list            # flags of finetune.py to choose from, for tables that were learned
    systems: dict           # {name: method} of table2 and the controls

    @property
    def has_pairs(self):
        """Whether there are both texts and images."""
        return {"T", "V"} <= set(self.letters)

    def cell(self, pretraining, finetuning, seed, data_flags=()):
        """A cell. Where the split is ours every seed has a split of its own."""
        if self.new_splits and (self.dataset.labels is None or data_flags):
            data_flags = ("--split-seed", str(self.split_seed + seed), *data_flags)
        return Cell(pretraining, finetuning, seed, tuple(data_flags))

    def pretraining(self, system, *flags):
        """The command that makes a system's tables; None for a random start."""
        if system == "random":
            return None
        if system not in ("mmcpr", "mf"):
            return ("baselines.py", "--method", system, *flags)
        # The other systems' patience counts steps, and stays theirs.
        if self.patience:
            flags += ("--patience", str(self.patience))
        # Matrix factorisation by the BCE of Eq. 15: tables of users and items, nothing else.
        if system == "mf":
            flags = ("--modalities", "none", *flags)
        return ("mmcpr.py", *flags)

    def run_rows(self, wanted, title, data_flags=()):
        """{row: (pretraining, finetuning)} -> {row: [a found cell for each seed]}.

        Without the rows that the data has nothing for.
        """
        cells = []
        for pretraining, finetuning in wanted.values():
            for seed in self.seeds:
                cells.append(self.cell(pretraining, finetuning, seed, data_flags))
        found = self.cells.run(cells, title)
        rows = {}
        # The cells are in order: a row's seeds stand side by side.
        for start, name in zip(range(0, len(cells), len(self.seeds)), wanted):
            row = slice(start, start + len(self.seeds))
            if all(found[row]):
                rows[name] = Row(cells[row], found[row])
        return rows

    def show(self, name, lines):
        """Prints Markdown, and keeps it as <name>.md."""
        text = "\n".join(lines) + "\n"
        run.write_file(self.folder / f"{name}.md", lambda file: file.write(text), "w")
        print(f"\n{text}", flush=True)


class Choice(NamedTuple):
    rate: tuple   # flags of the pre-training
    scale: tuple  # flags of finetune.py


def scales_of(sweep, command):
    """The flags of finetune.py to choose among for tables that a command makes."""
    if command is None:
        return (AS_IS,)
    if "popular" in command:
        return (NOT_TUNED,)
    return sweep.scales


def validation_recall(found):
    """What a found cell is chosen by; what diverged, or has nothing to do, loses to anything."""
    return found["finetune"]["valid"]["recall@20"] if found else -1


def choose(sweep, systems):
    """{system: Choice}: the learning rate and the scale of the start, by validation.

    Of all pairs the one with the best validation Recall@20 after fine-tuning, on the first seed.
    What learns nothing has no rate, and a random start no other scale.
    """
    grid = []
    for system in systems:
        rates = [("--lr", lr) for lr in sweep.rates]
        if system in ("popular", "random", "constant", "clip"):
            rates = [()]
        for scale in scales_of(sweep, sweep.pretraining(system)):
            for rate in rates:
                grid.append((system, Choice(rate, scale)))
    cells = []
    for system, choice in grid:
        command = sweep.pretraining(system, *choice.rate)
        cells.append(sweep.cell(command, choice.scale, sweep.seeds[0]))
    found = sweep.cells.run(cells, "learning rate and scale", may_diverge=True)
    chosen, best = {}, {}
    for (system, choice), cell in zip(grid, found):
        recall = validation_recall(cell)
        if system not in best or recall > best[system]:
            chosen[system], best[system] = choice, recall
    return chosen


# --- The text of a table ------------------------------------------------------------------

def test_values(row, metric):
    """float [n_seeds]: one test metric."""
    return np.array([cell["finetune"]["test"][metric] for cell in row.found])


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
    """As "+5.1 % ± 1.2 (p = 0.002)": the relative gain, its standard error, p."""
    found = difference(sweep, ours, other, metric)
    base = test_values(other, metric).mean()
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    return f"{100 * found.mean / base:+.1f} % ± {100 * found.error / base:.1f} ({p})"


def best_of(rows, metric):
    """The name of the row with the highest mean."""
    return max(rows, key=lambda name: test_values(rows[name], metric).mean())


def title_of(sweep, name):
    """A table's title; it names what is not the default."""
    title = f"# {name}, {sweep.label}, seeds {' '.join(map(str, sweep.seeds))}"
    if tuple(sweep.rates) != GRID:
        title += f", rates {' '.join(sweep.rates)}"
    if sweep.patience:
        title += f", patience {sweep.patience}"
    if len(sweep.scales) == 1:
        title += f", scale {scale_name(sweep.scales[0], False)}"
    return title + sweep.settings


def table(sweep, name, rows, columns=None):
    """Lines of Markdown of rows {name: its cells}.

    columns: {title of a column beside the metrics: {row: text}}.
    """
    return [title_of(sweep, name), "", *table_lines(rows, columns)]


def table_lines(rows, columns=None):
    """The same without the title."""
    columns = columns or {}
    names = [*METRICS, *columns]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for name, row in rows.items():
        texts = [name]
        for metric in METRICS:
            texts.append(mean_and_deviation(test_values(row, metric)))
        for column in columns.values():
            texts.append(column.get(name, ""))
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


def rms(row):
    """The RMS of the tables as they were handed over, of the first seed."""
    return f"{row.found[0]['report']['rms']['all']:.4g}"


def write_runs(path, used):
    """<target>.csv of {Cell: what it found}: what a paired comparison needs."""
    header = ["pretraining", "finetuning", "data", "seed", "epoch", "valid recall@20", *METRICS]
    rows = []
    for cell, found in used.items():
        if found is None:
            continue
        result = found["finetune"]
        row = [" ".join(cell.pretraining or ("random",)),
               " ".join(("finetune.py", *cell.finetuning)), " ".join(cell.data), cell.seed,
               result["epoch"], f"{result['valid']['recall@20']:.6f}"]
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
    chosen = choose(sweep, sweep.systems.values())
    wanted = {}
    for name, system in sweep.systems.items():
        choice = chosen[system]
        wanted[name] = (sweep.pretraining(system, *choice.rate), choice.scale)
    rows = sweep.run_rows(wanted, "table 2")
    systems = {name: sweep.systems[name] for name in rows}

    # Vectors that are not CLIP's do not stand under its name.
    if "CLIP" in rows and rows["CLIP"].found[0]["report"]["method"] == "text+image":
        rename(rows, "CLIP", "text+image")
        rename(systems, "CLIP", "text+image")

    # A random start with larger rows is no weaker than one with smaller rows.
    at_our_rms = (None, ("--scale", rms(rows["MMCPR"])))
    rows |= sweep.run_rows({"Random at the RMS of MMCPR as is": at_our_rms},
                           "Random at MMCPR's RMS")
    # The paper's rate, no decay, no bias; what it leaves open as ever.
    rows |= sweep.run_rows({"MMCPR, the paper's recipe": papers_recipe(sweep)},
                           "the paper's recipe")
    # Of the other systems only GCN-P reads reviews.
    if "R" in sweep.letters:
        choice = chosen["mmcpr"]
        command = sweep.pretraining("mmcpr", *choice.rate, "--modalities", "TVG")
        rows |= sweep.run_rows({"MMCPR without reviews": (command, choice.scale)},
                               "without reviews")
    if sweep.letters != "G":
        choice = chosen["mmcpr"]
        command = sweep.pretraining("mmcpr", *choice.rate, "--shuffle-contents")
        rows |= sweep.run_rows({"MMCPR, contents shuffled": (command, choice.scale)},
                               "contents shuffled")

    lines = table(sweep, "Table 2", rows, table2_columns(rows, systems, chosen, sweep.label))
    lines.append("")
    others = {}
    for name, row in rows.items():
        if name not in CONTROLS and not name.startswith(("MMCPR", "Random")):
            others[name] = row
    controls = {name: rows[name] for name in CONTROLS}
    for name in ("MMCPR", "MMCPR without reviews", "MMCPR, contents shuffled",
                 "MMCPR, the paper's recipe"):
        for metric in ("recall@20", "ndcg@20"):
            if name in rows:
                lines.append(comparison(sweep, name, rows, controls, others, metric))
    lines += ["", smallest_difference(sweep, rows), "",
              f"{P_VALUE} The best control and the best other are the best on test. users: where a "
              "system brings none, fine-tuning starts them at random."]
    sweep.show("table2", lines)


def rename(rows, name, new_name):
    """Gives an entry of a dict another name, in its place."""
    entries = list(rows.items())
    rows.clear()
    for key, value in entries:
        rows[new_name if key == name else key] = value


def papers_recipe(sweep):
    """(pretraining, finetuning) of MMCPR as the paper has it, at the scale validation chooses."""
    command = sweep.pretraining("mmcpr", *THE_PAPERS)
    return command, choose_scale(sweep, command, "the paper's recipe")


def scale_cells(sweep, command, data_flags=()):
    """The first seed's cells of a pre-training among which validation chooses the scale."""
    return [sweep.cell(command, scale, sweep.seeds[0], data_flags)
            for scale in scales_of(sweep, command)]


def choose_scale(sweep, command, title, data_flags=()):
    """AS_IS or XAVIER, by the first seed's validation Recall@20 after fine-tuning."""
    cells = scale_cells(sweep, command, data_flags)
    found = sweep.cells.run(cells, f"{title}: scale")
    best = int(np.argmax([validation_recall(cell) for cell in found]))
    return cells[best].finetuning


def table2_columns(rows, systems, chosen, label):
    """Whose users each row starts from, what validation chose for it, and the paper's value."""
    users, rates, scales, cosines = {}, {}, {}, {}
    for name, row in rows.items():
        report = row.found[0]["report"]
        users[name] = "its own" if report and "user" in report["rms"] else "random"
        cosine = report.get("mean_cosine") if report else None
        cosines[name] = "" if cosine is None else f"{cosine:.3f}"
    for name, system in systems.items():
        choice = chosen[system]
        rates[name] = choice.rate[1] if choice.rate else ""
        scales[name] = scale_name(choice.scale, system == "random")
    columns = {"users": users, "lr": rates, "scale": scales, "mean cosine of items": cosines}
    return columns | paper_column(PAPER_SYSTEMS, PAPER.get(label))


def scale_name(finetuning, is_random):
    if finetuning == NOT_TUNED:
        return "not tuned"
    return "Xavier's" if finetuning == XAVIER or is_random else "as is"


def comparison(sweep, name, rows, controls, others, metric):
    """One line: a row against the best control, Random, and the best of the others."""
    best_control = best_of(controls, metric)
    texts = [f"over the best control, {best_control}, "
             + gain(sweep, rows[name], controls[best_control], metric)]
    if best_control != "Random":
        texts.append(f"over Random {gain(sweep, rows[name], controls['Random'], metric)}")
    if others:
        best = best_of(others, metric)
        texts.append(f"over the best other, {best}, "
                     + gain(sweep, rows[name], others[best], metric))
    return f"- {name}, {metric}: " + "; ".join(texts)


def smallest_difference(sweep, rows, metric="recall@20"):
    """One line: what difference these users and seeds can tell from none."""
    found = difference(sweep, rows["MMCPR"], rows["Random"], metric)
    smallest = 1.96 * found.error
    share = smallest / test_values(rows["Random"], metric).mean()
    return (f"The smallest difference to Random that these users and seeds tell from none: "
            f"{smallest:.4f} of {metric}, {share:.1%} (1.96 standard errors).")


def control_rows(sweep):
    """The rows of the controls, at the rate and scale that validation chooses for each."""
    chosen = choose(sweep, [SYSTEMS[name] for name in CONTROLS])
    wanted = {}
    for name in CONTROLS:
        choice = chosen[SYSTEMS[name]]
        wanted[name] = (sweep.pretraining(SYSTEMS[name], *choice.rate), choice.scale)
    return sweep.run_rows(wanted, "controls")


def table3(sweep):
    choice = choose(sweep, ["mmcpr"])["mmcpr"]
    variants = {"w/o CIMA (λ = 0)": ("--lam", "0"), "w/o BCE (λ = 1)": ("--lam", "1"),
                "MMCPR": ()}
    wanted = {}
    for name, flags in variants.items():
        # Without items that have both text and image there is no CIMA to leave out.
        if sweep.has_pairs or name == "MMCPR":
            wanted[name] = (sweep.pretraining("mmcpr", *choice.rate, *flags), choice.scale)
    rows = control_rows(sweep) | sweep.run_rows(wanted, "table 3")
    columns = {}
    for metric in ("recall@20", "ndcg@20"):
        gains = {}
        for name, row in rows.items():
            if name != "MMCPR":
                gains[name] = gain(sweep, row, rows["MMCPR"], metric)
        columns[f"{metric} against MMCPR"] = gains
    columns |= paper_column(variants, PAPER_ABLATION.get(sweep.label))
    sweep.show("table3", [*table(sweep, "Table 3", rows, columns), "", P_VALUE])


def scale_of_start(sweep):
    """What is left of the gain where both starts have one scale, or the towers no training.

    Not trained, they still hand over averages over co-interaction neighbours and projected
    contents, and not noise.
    """
    rate = choose(sweep, ["mmcpr"])["mmcpr"].rate
    ours = sweep.pretraining("mmcpr", *rate)
    wanted = {"MMCPR, as is": (ours, AS_IS), "MMCPR, to Xavier's RMS": (ours, XAVIER)}
    if sweep.has_pairs:
        without = sweep.pretraining("mmcpr", *rate, "--lam", "0")
        wanted["w/o CIMA, as is"] = (without, AS_IS)
        wanted["w/o CIMA, to Xavier's RMS"] = (without, XAVIER)
    wanted["MMCPR not trained, to Xavier's RMS"] = (sweep.pretraining("mmcpr", *UNTRAINED), XAVIER)
    rows = sweep.run_rows(wanted, "scale")
    our_rms = ("--scale", rms(rows["MMCPR, as is"]))
    rows |= sweep.run_rows({"Random, at the RMS of MMCPR as is": (None, our_rms)}, "scale")
    rows |= control_rows(sweep)
    sweep.show("scale", table(sweep, "Scale of the start", rows))
    # The curves without the ablation: they would hide each other.
    curves = {}
    for name, row in rows.items():
        if "CIMA" not in name:
            histories = [cell["finetune"]["history"] for cell in row.found]
            curves[name] = curve(histories, "recall@20")
    panels = {"validation Recall@20": curves}
    plot(sweep.folder / "scale.png", panels, draw_lines, "epoch of fine-tuning")


# --- The map: how each gain fades as data grows, and who gains --------------------------------

SHARES = (".1", ".2", ".4", ".7", "1")


def starts(sweep):
    """{name: pretraining} of the map: the controls, graphs or contents alone, and everything.

    With the scripts' own recipe: no rate is chosen.
    """
    wanted = {name: sweep.pretraining(SYSTEMS[name]) for name in CONTROLS}
    wanted["Graphs alone"] = sweep.pretraining("mmcpr", "--modalities", "G")
    contents = sweep.letters.removesuffix("G")
    if contents:
        command = sweep.pretraining("mmcpr", "--modalities", contents)
        wanted[f"Contents alone ({contents})"] = command
        wanted["MMCPR"] = sweep.pretraining("mmcpr")
    return wanted


def run_starts(sweep, wanted, title, splits):
    """run_rows of {name: pretraining} at the scale that validation chooses, for each split.

    splits: {name of a split: flags of the data}. Returns {name of a split: its rows}. All that
    can run side by side does: first the choice, then the rows.
    """
    trials = []
    for data_flags in splits.values():
        for command in wanted.values():
            trials += scale_cells(sweep, command, data_flags)
    sweep.cells.run(trials, f"{title}: scale")
    rows_of, chosen, cells = {}, {}, []
    for split, data_flags in splits.items():
        chosen[split] = {}
        for name, command in wanted.items():
            scale = choose_scale(sweep, command, title, data_flags)
            chosen[split][name] = (command, scale)
            for seed in sweep.seeds:
                cells.append(sweep.cell(command, scale, seed, data_flags))
    sweep.cells.run(cells, title)
    for split, data_flags in splits.items():
        rows_of[split] = sweep.run_rows(chosen[split], title, data_flags)
    return rows_of


def regimes(sweep):
    """Recall and NDCG against the share of training interactions that is kept."""
    splits = {}
    for kept in sweep.shares:
        # All of it: the cells of Table 2.
        splits[kept] = () if float(kept) == 1 else ("--keep", kept)
    rows_at = run_starts(sweep, starts(sweep), "the map", splits)
    lines = [title_of(sweep, "The map"), ""]
    for kept, rows in rows_at.items():
        lines += regime_lines(sweep, kept, rows)
    for kept, rows in rows_at.items():
        lines += who_lines(sweep, kept, rows)
    lines.append(P_VALUE)
    sweep.show("regimes", lines)
    panels = {}
    for metric in ("recall@20", "ndcg@20"):
        curves = {}
        for name in starts(sweep):
            x = [float(kept) for kept in sweep.shares]
            curves[name] = (x, [test_values(rows[name], metric) for rows in rows_at.values()])
        panels[f"test {metric}"] = curves
    plot(sweep.folder / "regimes.png", panels, draw_lines, "share of the training interactions")
    plot_who(sweep, rows_at)


def regime_lines(sweep, kept, rows):
    """Lines of Markdown of one share: the metrics, and what each row gains."""
    controls = {name: rows[name] for name in CONTROLS}
    best = best_of(controls, "recall@20")
    over_best, over_random, scales = {}, {}, {}
    for name, row in rows.items():
        scales[name] = scale_name(row.cells[0].finetuning, name == "Random")
        if name != best:
            over_best[name] = gain(sweep, row, rows[best], "recall@20")
        if name != "Random":
            over_random[name] = gain(sweep, row, rows["Random"], "recall@20")
    columns = {f"recall@20 over {best}": over_best, "over Random": over_random, "scale": scales}
    return [f"## Share {kept}", "", *table_lines(rows, columns), ""]


def who_lines(sweep, kept, rows):
    """Lines of Markdown of one share: who gains, by how much is known of a user, of an item."""
    return [*bin_lines(sweep, rows, f"Share {kept}, Recall@20 by a user's training interactions",
                       compare.by_user, compare.USER_BINS),
            *bin_lines(sweep, rows, f"Share {kept}, test interactions ranked among the first 20, "
                       "by the item's training interactions",
                       compare.by_item, compare.ITEM_BINS)]


def in_bins(sweep, rows, means_of):
    """({name: float [n_bins]}, counts [n_bins]) of the controls and MMCPR.

    means_of: compare.by_user or by_item. The counts are the same for all rows.
    """
    values, counts = {}, []
    for name in (*CONTROLS, "MMCPR"):
        if name in rows:
            of_runs = [sweep.cells.per_user(cell) for cell in rows[name].cells]
            values[name], counts = means_of(of_runs)
    return values, counts


def bin_lines(sweep, rows, title, means_of, edges):
    names = compare.bin_names(edges)
    lines = [f"### {title}", "", "| | " + " | ".join(names) + " |",
             "|---" * (1 + len(names)) + "|"]
    values, counts = in_bins(sweep, rows, means_of)
    for name, means in values.items():
        texts = ["" if np.isnan(mean) else f"{mean:.4f}" for mean in means]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    lines.append("| how many, all seeds | " + " | ".join(f"{n:,}" for n in counts) + " |")
    return [*lines, ""]


def plot_who(sweep, rows_at):
    """Who gains: by user and by item with all that is kept, by item with the least."""
    most, least = max(rows_at, key=float), min(rows_at, key=float)
    wanted = {f"Recall@20 by user, share {most}": (most, compare.by_user, compare.USER_BINS),
              f"hits@20 by item, share {most}": (most, compare.by_item, compare.ITEM_BINS),
              f"hits@20 by item, share {least}": (least, compare.by_item, compare.ITEM_BINS)}
    panels = {}
    for title, (kept, means_of, edges) in wanted.items():
        values, _ = in_bins(sweep, rows_at[kept], means_of)
        curves = {}
        for name, means in values.items():
            curves[name] = (compare.bin_names(edges), [[mean] for mean in means])
        panels[title] = curves
    plot(sweep.folder / "who.png", panels, draw_lines, "training interactions")


def new_items(sweep):
    """A tenth of the items without any training interaction, ranked among themselves."""
    contents = sweep.letters.removesuffix("G")
    if not set(contents) & set("TV"):
        print("new items: this data has neither texts nor images to know them by")
        return
    alone = sweep.pretraining("mmcpr", "--modalities", contents)
    wanted = {"Random": None, f"Contents alone ({contents})": alone,
              "MMCPR": sweep.pretraining("mmcpr")}
    if sweep.has_pairs:
        wanted["w/o CIMA (λ = 0)"] = sweep.pretraining("mmcpr", "--lam", "0")
    data_flags = ("--new-items", "0.1")
    tuned = run_starts(sweep, wanted, "new items", {"new": data_flags})["new"]
    as_given = {name: (command, ("--epochs", "0")) for name, command in wanted.items()}
    rows = {}
    for name, row in sweep.run_rows(as_given, "new items as handed over", data_flags).items():
        rows[f"{name}, as handed over"] = row
        rows[f"{name}, fine-tuned"] = tuned[name]
    n_new = round(0.1 * sweep.dataset.n_items)
    lines = [title_of(sweep, "New items"), "",
             f"{n_new} of {sweep.dataset.n_items:,} items, ranked among themselves; chance is a "
             f"Recall@20 of {min(1, 20 / n_new):.3f}.", "", *table_lines(rows)]
    if "w/o CIMA (λ = 0), as handed over" in rows:
        lines.append("")
        for how in ("as handed over", "fine-tuned"):
            text = gain(sweep, rows[f"MMCPR, {how}"], rows[f"w/o CIMA (λ = 0), {how}"],
                        "recall@20")
            lines.append(f"- {how}: MMCPR over MMCPR without CIMA, recall@20 {text}")
    sweep.show("new-items", [*lines, "", P_VALUE])


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
        axis.tick_params("x", rotation=60)


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
    figure, axes = open_figure(len(panels), 5)
    for axis, (title, curves) in zip(axes, panels.items()):
        draw(axis, curves)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    figure.tight_layout()
    save_figure(path, figure)


def open_figure(n_panels, width):
    """(figure, its panels side by side), each `width` inches wide."""
    # Imported here: it takes a second, and most calls plot nothing.
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, n_panels, figsize=(width * n_panels, 3.6), squeeze=False)
    return figure, axes[0]


def save_figure(path, figure):
    from matplotlib import pyplot
    run.write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def fig3(sweep):
    choice = choose(sweep, ["mmcpr"])["mmcpr"]
    command = sweep.pretraining("mmcpr", *choice.rate)
    wanted = {}
    for subset in ("T", "V", "R", "G", "TV", "TG", "VG", "RG", "TVG", "RTVG"):
        if set(subset) == set(sweep.letters):
            wanted[subset] = (command, choice.scale)  # all that there is: the cells of Table 2
        elif set(subset) < set(sweep.letters):
            wanted[subset] = ((*command, "--modalities", subset), choice.scale)
    subsets = sweep.run_rows(wanted, "figure 3")
    rows = control_rows(sweep) | subsets
    column = {subset: attention_text(row) for subset, row in subsets.items()}
    lines = table(sweep, "Figure 3", rows, {"mean attention where present": column})
    lines += ["", "A side that a subset leaves with nothing (users under T, V, TV; items under "
                  "R) has a trained table instead."]
    sweep.show("fig3", lines)
    plot_subsets(sweep.folder / "fig3.png", rows)
    plot_attention(sweep.folder / "attention.png", subsets)
    plot_training(sweep.folder / "training.png", subsets)


def attention_of(row, side):
    """{modality: its mean attention, one value of each seed}; side: "user" or "item"."""
    values = {}
    for modality in row.found[0]["report"]["modalities"][side]:
        of_seeds = [cell["report"]["modalities"][side][modality] for cell in row.found]
        values[modality] = [of_seed["attention"] for of_seed in of_seeds]
    return values


def attention_text(row):
    """As "user R 0.40 G 0.60; item T 0.30 G 0.70": the means over seeds."""
    texts = []
    for side in ("user", "item"):
        words = [side]
        for modality, values in attention_of(row, side).items():
            words.append(f"{modality} {np.mean(values):.2f}")
        if len(words) > 1:
            texts.append(" ".join(words))
    return "; ".join(texts)


def plot_subsets(path, rows):
    panels = {}
    for metric in ("recall@20", "ndcg@20"):
        values = [test_values(row, metric) for row in rows.values()]
        panels[metric] = {"MMCPR": (list(rows), values)}
    plot(path, panels, draw_bars)


def plot_attention(path, rows):
    panels = {}
    for side in ("user", "item"):
        shown = {}
        for subset, row in rows.items():
            attention = attention_of(row, side)
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
        for subset, row in rows.items():
            if len(subset) != 2:
                curves[subset] = curve([row.found[0]["report"]["history"]], key)
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
            wanted[name] = (sweep.pretraining("mmcpr", *choice.rate, *flags), choice.scale)
            points[name] = (reading, float(lam))
    rows = sweep.run_rows(wanted, "figure 4")
    controls = control_rows(sweep)
    column = {}
    for name, row in rows.items():
        if points[name][1] < 1:  # else there is no BCE
            column[name] = f"{np.mean([bce_share(cell) for cell in row.found]):.2f}"
    columns = {"BCE, of that of popularity alone": column}
    sweep.show("fig4", table(sweep, "Figure 4", controls | rows, columns))
    panels = {}
    for metric in ("recall@20", "ndcg@20"):
        curves = {"softmax": ([], []), "bce": ([], [])}
        for name, row in rows.items():
            reading, lam = points[name]
            weights, values = curves[reading]
            weights.append(lam)
            values.append(test_values(row, metric))
        # They have no λ: a line from end to end.
        for name, row in controls.items():
            curves[name] = ([0, 1], [test_values(row, metric)] * 2)
        panels[metric] = curves
    plot(sweep.folder / "fig4.png", panels, draw_lines, "λ")


def bce_share(cell):
    """The BCE reached, of that of item popularity alone."""
    return cell["report"]["losses"]["bce"] / cell["report"]["popularity_loss"]


# --- The command line ---------------------------------------------------------------------

TARGETS = {"table1": table1, "table2": table2, "table3": table3, "fig3": fig3, "fig4": fig4,
           "scale": scale_of_start, "regimes": regimes, "new-items": new_items}


def rate(text):
    """argparse type: a learning rate, as it was written."""
    if not 0 < float(text) < np.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return text


def share(text):
    """argparse type: a share above 0 and up to 1, as it was written."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return text


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m paper.reproduce", formatter_class=run.Help,
        description="Make the paper's tables and figures.")
    parser.add_argument("target", choices=(*TARGETS, "all"))
    parser.add_argument("--seeds", type=run.non_negative, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=rate, nargs="+", default=GRID,
                        help="learning rates to choose from; the default is the paper's grid")
    parser.add_argument("--patience", type=run.positive,
                        help="of mmcpr.py, in epochs; the default is its own")
    parser.add_argument("--shares", type=share, nargs="+", default=SHARES,
                        help="of each user's training interactions, for regimes "
                        "(default: .1 .2 .4 .7 1)")
    parser.add_argument("--scales", choices=SCALES, nargs="+", default=list(SCALES),
                        help="of the start of fine-tuning, to choose from")
    parser.add_argument("--systems", choices=OTHERS, nargs="+", default=list(OTHERS),
                        help="of table2, beside the controls and MMCPR")
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
    if args.keep is not None or args.new_items is not None:
        raise run.InputError("--keep and --new-items are set by the targets regimes and new-items; "
                             "leave them out")
    if len(set(map(float, args.shares))) < len(args.shares):
        raise run.InputError("--shares names one twice")
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
    letters = "".join(letter for letter in "RTV" if letter in features) + "G"
    scales = [SCALES[name] for name in args.scales]
    systems = {}
    for name, method in SYSTEMS.items():
        if method not in OTHERS or method in args.systems:
            systems[name] = method
    return Sweep(cells, folder, label, args.seeds, args.rates, args.patience, settings, dataset,
                 data_options["split_seed"], not data_options["sample"], letters, args.shares,
                 scales, systems)


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
