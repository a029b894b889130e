"""When pre-training pays on one data set: regimes, paper-recipe and new-items of reproduce.py.

They show how each gain fades as training data grows, which users and items gain, and how items
without any interaction fare.
"""
import numpy as np

from paper import compare
from paper.figures import draw_lines, plot
from paper.sweep import (CONTROLS, NO_CIMA, PAPERS_RECIPE, SYSTEMS, best_of, choice_columns,
                         choose_scale, gain, gains_over_mmcpr, p_note, scale_cells,
                         smallest_difference, table_lines, test_values, title_of)

SHARES = (".1", ".2", ".4", ".7", "1")
TWO_SHARES = ("1", ".2")


def splits_of(shares):
    """{share: flags of the data}; all of it needs no flag, so its cells are the other targets'."""
    return {kept: () if float(kept) == 1 else ("--keep", kept) for kept in shares}


def starts(sweep, recipe=()):
    """{name: pretraining} of the map: the controls, graphs or contents alone, and everything.

    recipe: flags of mmcpr.py. No rate is chosen.
    """
    wanted = {}
    for name in CONTROLS:
        # Matrix factorisation is the one control that mmcpr.py trains.
        flags = recipe if SYSTEMS[name] == "mf" else ()
        wanted[name] = sweep.pretraining(SYSTEMS[name], *flags)
    wanted["Graphs alone"] = sweep.pretraining("mmcpr", "--modalities", "G", *recipe)
    if sweep.contents:
        command = sweep.pretraining("mmcpr", "--modalities", sweep.contents, *recipe)
        wanted[sweep.contents_alone] = command
        wanted["MMCPR"] = sweep.pretraining("mmcpr", *recipe)
    return wanted


def run_starts(sweep, wanted, title, splits):
    """run_rows of {name: pretraining} at the scale that validation chooses, for each split.

    splits: {name of a split: flags of the data}. Returns {name of a split: its rows}. A cell that
    is there is only read. So that many cells can run side by side, first the trials of all splits
    are run, then all cells of their rows; the last loop only reads.
    """
    trials = []
    for data_flags in splits.values():
        for command in wanted.values():
            trials += scale_cells(sweep, command, data_flags)
    sweep.cells.run(trials, f"{title}: scale")
    chosen, cells = {}, []
    for split, data_flags in splits.items():
        chosen[split] = {}
        for name, command in wanted.items():
            scale = choose_scale(sweep, command, title, data_flags)
            chosen[split][name] = (command, scale)
            for seed in sweep.seeds:
                cells.append(sweep.cell(command, scale, seed, data_flags))
    sweep.cells.run(cells, title)
    rows_of = {}
    for split, data_flags in splits.items():
        rows_of[split] = sweep.run_rows(chosen[split], title, data_flags)
    return rows_of


def regimes(sweep):
    """Recall and NDCG against the share of training interactions that is kept."""
    rows_at = run_starts(sweep, starts(sweep), "the map", splits_of(sweep.shares))
    lines = [title_of(sweep, "The map"), ""]
    for kept, rows in rows_at.items():
        lines += regime_lines(sweep, kept, rows)
    for kept, rows in rows_at.items():
        lines += who_lines(sweep, kept, rows)
    lines.append(p_note(sweep))
    sweep.show("regimes", lines)
    panels, shares = {}, [float(kept) for kept in rows_at]
    for metric in ("recall@20", "ndcg@20"):
        curves = {}
        for name in starts(sweep):
            curves[name] = (shares, [test_values(rows[name], metric) for rows in rows_at.values()])
        panels[f"test {metric}"] = curves
    plot(sweep.folder / "regimes.png", panels, draw_lines, "share of the training interactions")
    plot_who(sweep, rows_at)


def regimes_by_papers_recipe(sweep):
    """Two shares of the map, with all that is trained by the paper's recipe.

    Graphs alone are left out: they would take hours more, and no gain is told over them.
    """
    wanted = starts(sweep, PAPERS_RECIPE)
    del wanted["Graphs alone"]
    rows_at = run_starts(sweep, wanted, "the paper's recipe", splits_of(TWO_SHARES))
    lines = [title_of(sweep, "The map by the paper's recipe"), ""]
    for kept, rows in rows_at.items():
        lines += regime_lines(sweep, kept, rows)
    sweep.show("paper-recipe", [*lines, p_note(sweep)])


def regime_lines(sweep, kept, rows):
    """Lines of Markdown of one share: the metrics, and what each row gains."""
    controls = {name: rows[name] for name in CONTROLS}
    best = best_of(controls, "recall@20")
    over_best, over_random, epochs = {}, {}, {}
    for name, row in rows.items():
        epochs[name] = " ".join(str(outcome["finetune"]["epoch"]) for outcome in row.found)
        if name != best:
            over_best[name] = gain(sweep, row, rows[best], "recall@20")
        if name != "Random":
            over_random[name] = gain(sweep, row, rows["Random"], "recall@20")
    columns = {f"recall@20 over {best}": over_best, "over Random": over_random,
               "scale": choice_columns(rows)["scale"], "epochs of fine-tuning": epochs}
    lines = [f"## Share {kept}", "", *table_lines(rows, columns), ""]
    if "MMCPR" in rows:
        lines += [*gains_over_mmcpr(sweep, rows, sweep.contents_alone), "",
                  smallest_difference(sweep, rows), ""]
    return lines


def who_lines(sweep, kept, rows):
    """Lines of Markdown of one share: who gains, by a user's or an item's training interactions."""
    return [*bin_lines(sweep, rows, f"Share {kept}, Recall@20 by a user's training interactions",
                       compare.by_user),
            *bin_lines(sweep, rows, f"Share {kept}, test interactions ranked among the first 20, "
                       "by the item's training interactions", compare.by_item)]


def bins_of_rows(sweep, rows, bins_of):
    """{name: Bins} of the controls and MMCPR; bins_of: compare.by_user or by_item."""
    found = {}
    for name in (*CONTROLS, "MMCPR"):
        if name in rows:
            found[name] = bins_of([sweep.cells.per_user(cell) for cell in rows[name].cells])
    return found


def bin_lines(sweep, rows, title, bins_of):
    found = bins_of_rows(sweep, rows, bins_of)
    # Names and counts are the same for all rows.
    names, _, counts = found["Random"]
    lines = [f"### {title}", "", "| | " + " | ".join(names) + " |",
             "|---" * (1 + len(names)) + "|"]
    for name, bins in found.items():
        texts = ["" if np.isnan(mean) else f"{mean:.4f}" for mean in bins.means]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    lines.append("| how many, all seeds | " + " | ".join(f"{n:,}" for n in counts) + " |")
    return [*lines, ""]


def plot_who(sweep, rows_at):
    """Who gains: by user and by item at the largest share, by item at the smallest share too."""
    most, least = max(rows_at, key=float), min(rows_at, key=float)
    wanted = {f"Recall@20 by user, share {most}": (most, compare.by_user),
              f"hits@20 by item, share {most}": (most, compare.by_item),
              f"hits@20 by item, share {least}": (least, compare.by_item)}
    panels = {}
    for title, (kept, bins_of) in wanted.items():
        curves = {}
        for name, bins in bins_of_rows(sweep, rows_at[kept], bins_of).items():
            curves[name] = (bins.names, [[mean] for mean in bins.means])
        panels[title] = curves
    plot(sweep.folder / "who.png", panels, draw_lines, "training interactions")


def new_items(sweep):
    """A tenth of the items has no training interaction; these are ranked among themselves."""
    if not set(sweep.contents) & set("TV"):
        print("new items: this data has neither texts nor images to know them by")
        return
    alone = sweep.pretraining("mmcpr", "--modalities", sweep.contents)
    wanted = {"Random": None, sweep.contents_alone: alone, "MMCPR": sweep.pretraining("mmcpr")}
    if sweep.has_pairs:
        wanted[NO_CIMA] = sweep.pretraining("mmcpr", "--lam", "0")
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
    if NO_CIMA in wanted:
        lines.append("")
        for how in ("as handed over", "fine-tuned"):
            text = gain(sweep, rows[f"MMCPR, {how}"], rows[f"{NO_CIMA}, {how}"], "recall@20")
            lines.append(f"- {how}: MMCPR over MMCPR without CIMA, recall@20 {text}")
    sweep.show("new-items", [*lines, "", p_note(sweep)])
