"""Every table and figure of the paper, and the map of when pre-training pays.

    python -m paper.reproduce table2 --data demo --seeds 0 1 2

    table1        counts of the data set
    table2        the systems of baselines.py and the controls beside MMCPR
    table3        MMCPR without CIMA, without BCE
    fig3          subsets of the modalities
    fig4          the loss weight, both readings of CIMA
    scale         what share of the gain is only scale and smoothing
    regimes       the map: how each gain fades as training data grows, and who gains
    paper-recipe  two shares of the map, with the paper's recipe for all that is trained
    new-items     items without any training interaction
    recipe        learning rates, weight decays and the bias, by validation
    all           all of them

A cell, one pre-training and one fine-tuning, is kept in results/<data>/cells (see cells.py).
<target>.csv lists the runs behind a table, also those that were tried for a choice.

Every seed has its own pre-training, and its own split where we draw it: seed 1 has split seed 1.
Two things are chosen for each system, on the first seed, by the validation Recall@20 after
fine-tuning: its learning rate, from the paper's grid, and the scale at which its tables are handed
over, as they are or Xavier's. Variants of MMCPR keep MMCPR's choice; Table 3 also has them with a
choice of their own. `regimes`, `new-items`, `recipe` and the paper's recipe choose the scale alone,
and `scale` compares the two scales.
"""
import argparse
import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

import run  # before the libraries: from here on Ctrl-C ends in one line

import numpy as np

import checkpoints
import data
import diagnostics
import disk
import mmcpr
from paper.cells import Cells
from paper.figures import draw_bars, draw_lines, draw_points, plot
from paper.regimes import (SHARES, TWO_SHARES, new_items, regimes, regimes_by_papers_recipe,
                           run_starts, splits_of)
from paper.sweep import (AS_IS, CONTROLS, GRID, NO_CIMA, OTHERS, PAPERS_RECIPE, SCALES,
                         SYSTEMS, XAVIER, Sweep, best_of, choice_columns, choose, choose_scale,
                         choose_variants, control_rows, gain, gains_over_mmcpr, p_note, rms,
                         scale_name, smallest_difference, table, test_values, title_of,
                         validation_recall, write_runs)

# Flags of mmcpr.py: one step, too small to move the towers from where they are drawn.
NO_TRAINING = ("--lr", "1e-9", "--epochs", "1", "--eval-every", "1")

# What Table 3 leaves out, as flags of mmcpr.py.
ABLATIONS = {NO_CIMA: ("--lam", "0"), "w/o BCE (λ = 1)": ("--lam", "1")}

# The recipes that are compared with the default, as flags of mmcpr.py; c is --weight-decay.
RECIPES = {"the paper's: lr 1e-3, c = 0, no bias": PAPERS_RECIPE,
           "lr 1e-3, c = 0": ("--lr", "1e-3", "--weight-decay", "0"),
           "lr 1e-3, c = 2": ("--lr", "1e-3"),
           "lr 1e-2, c = 0": ("--weight-decay", "0"),
           "lr 1e-2, c = 2, the default": (),
           "lr 1e-2, c = 2, no bias": ("--bias", "none"),
           "lr 1e-2, c = 6": ("--weight-decay", "6")}

# Recall@20 of the paper's Tables 2 and 3.
PAPER_SYSTEMS = ("Random", "CLIP", "MMGCN", "GPT-GNN", "Graph-BERT", "PMGT", "GCN-P", "MMCPR")
PAPER = {"vg": (.1571, .1712, .1703, .1659, .1696, .1718, .1916, .1939),
         "tg": (.0876, .0967, .0966, .0931, .1034, .1024, .1025, .1067),
         "sharee": (.1059, .1135, .1106, .1090, .1074, .1077, .1382, .1392)}
# Without CIMA, without BCE, MMCPR.
PAPER_ABLATION = {"vg": (.1898, .1729, .1939), "tg": (.1051, .0974, .1067),
                  "sharee": (.1316, .1143, .1392)}


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

    # Vectors that are not CLIP's do not stand under its name.
    if "CLIP" in rows and rows["CLIP"].found[0]["report"]["method"] == "text+image":
        rows = {"text+image" if name == "CLIP" else name: row for name, row in rows.items()}

    # A control of size alone: random tables at the RMS of MMCPR's.
    at_our_rms = (None, ("--scale", rms(rows["MMCPR"])))
    rows |= sweep.run_rows({"Random at the RMS of MMCPR as is": at_our_rms},
                           "Random at MMCPR's RMS")
    # The paper's rate, no decay, no bias; what the paper leaves open is as in our recipe.
    rows |= sweep.run_rows({"MMCPR, the paper's recipe": papers_recipe(sweep)},
                           "the paper's recipe")
    choice = chosen["mmcpr"]
    # Of the other systems only GCN-P reads reviews, so MMCPR is shown without them too.
    if "R" in sweep.letters:
        command = sweep.pretraining("mmcpr", *choice.rate, "--modalities", "TVG")
        rows |= sweep.run_rows({"MMCPR without reviews": (command, choice.scale)},
                               "without reviews")
    if sweep.contents:
        command = sweep.pretraining("mmcpr", *choice.rate, "--shuffle-contents")
        rows |= sweep.run_rows({"MMCPR, contents shuffled": (command, choice.scale)},
                               "contents shuffled")

    lines = table(sweep, "Table 2", rows, table2_columns(rows, sweep.label))
    lines.append("")
    others = {}
    for name, row in rows.items():
        if name not in CONTROLS and not name.startswith(("MMCPR", "Random")):
            others[name] = row
    controls = {name: rows[name] for name in CONTROLS}
    for name in ("MMCPR", "MMCPR without reviews", "MMCPR, the paper's recipe"):
        for metric in ("recall@20", "ndcg@20"):
            if name in rows:
                lines.append(comparison(sweep, name, rows, controls, others, metric))
    if "MMCPR, contents shuffled" in rows:
        lines += gains_over_mmcpr(sweep, rows, "MMCPR, contents shuffled")
    lines += ["", smallest_difference(sweep, rows), "",
              f"{p_note(sweep)} The best control and the best other are the best on test. users: "
              "where a system brings none, fine-tuning starts them at random."]
    sweep.show("table2", lines)


def papers_recipe(sweep):
    """(pretraining, finetuning) of MMCPR as the paper has it, at the scale validation chooses."""
    command = sweep.pretraining("mmcpr", *PAPERS_RECIPE)
    return command, choose_scale(sweep, command, "the paper's recipe")


def table2_columns(rows, label):
    """Where each row's users come from, its rate and scale, how alike its items are, and the
    paper's value."""
    users, cosines = {}, {}
    for name, row in rows.items():
        report = row.found[0]["report"]
        users[name] = "its own" if report and "user" in report["rms"] else "random"
        cosine = report.get("mean_cosine") if report else None
        cosines[name] = "" if cosine is None else f"{cosine:.3f}"
    columns = {"users": users} | choice_columns(rows) | {"mean cosine of items": cosines}
    return columns | paper_column(PAPER_SYSTEMS, PAPER.get(label))


def paper_column(names, values):
    """The column of the paper's Recall@20; none where the paper does not have the data set."""
    if values is None:
        return {}
    column = {}
    for name, value in zip(names, values):
        column[name] = f"{value:.4f}"
    return {"paper, recall@20": column}


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


def table3(sweep):
    # Without items that have both text and image there is no CIMA to leave out.
    ablations = ABLATIONS if sweep.has_pairs else {}
    variants = {"MMCPR": ("mmcpr",)}
    for name, flags in ablations.items():
        variants[name] = ("mmcpr", *flags)
    chosen = choose_variants(sweep, variants)
    ours = chosen["MMCPR"]
    listed = []  # (row, flags of mmcpr.py, Choice)
    for name, flags in ablations.items():
        listed.append((name, flags, ours))
        # MMCPR's rate may not suit a variant: then the rate would cost, not the missing loss.
        if chosen[name] != ours:
            listed.append((f"{name}, its own rate and scale", flags, chosen[name]))
    listed.append(("MMCPR", (), ours))
    wanted = {}
    for name, flags, choice in listed:
        wanted[name] = (sweep.pretraining("mmcpr", *choice.rate, *flags), choice.scale)
    rows = control_rows(sweep) | sweep.run_rows(wanted, "table 3")
    columns = choice_columns(rows)
    for metric in ("recall@20", "ndcg@20"):
        gains = {}
        for name, row in rows.items():
            if name != "MMCPR":
                gains[name] = gain(sweep, row, rows["MMCPR"], metric)
        columns[f"{metric} against MMCPR"] = gains
    columns |= paper_column((*ABLATIONS, "MMCPR"), PAPER_ABLATION.get(sweep.label))
    sweep.show("table3", [*table(sweep, "Table 3", rows, columns), "", p_note(sweep)])


def scale_of_start(sweep):
    """What is left of the gain where both starts have one scale, or the towers are not trained.

    Untrained towers do not hand over noise: they still average over co-interaction neighbours and
    project contents.
    """
    rate = choose(sweep, ["mmcpr"])["mmcpr"].rate
    ours = sweep.pretraining("mmcpr", *rate)
    wanted = {"MMCPR, as is": (ours, AS_IS), "MMCPR, to Xavier's RMS": (ours, XAVIER)}
    if sweep.has_pairs:
        without = sweep.pretraining("mmcpr", *rate, "--lam", "0")
        wanted["w/o CIMA, as is"] = (without, AS_IS)
        wanted["w/o CIMA, to Xavier's RMS"] = (without, XAVIER)
    wanted["MMCPR not trained, to Xavier's RMS"] = (
        sweep.pretraining("mmcpr", *NO_TRAINING), XAVIER)
    rows = sweep.run_rows(wanted, "scale")
    our_rms = ("--scale", rms(rows["MMCPR, as is"]))
    rows |= sweep.run_rows({"Random, at the RMS of MMCPR as is": (None, our_rms)}, "scale")
    rows |= control_rows(sweep)
    sweep.show("scale", table(sweep, "Scale of the start", rows))
    # The ablation's curves are left out: with them the curves would hide each other.
    curves = {}
    for name, row in rows.items():
        if "CIMA" not in name:
            histories = [outcome["finetune"]["history"] for outcome in row.found]
            curves[name] = curve(histories, "recall@20")
    panels = {"validation Recall@20": curves}
    plot(sweep.folder / "scale.png", panels, draw_lines, "epoch of fine-tuning")


def recipe(sweep):
    """Validation Recall@20 of each of RECIPES after fine-tuning, on the first two seeds.

    On all of the training data and on a fifth of it. Test is not shown: a recipe is chosen here.
    """
    sweep = replace(sweep, seeds=sweep.seeds[:2])
    wanted = {name: sweep.pretraining("mmcpr", *flags) for name, flags in RECIPES.items()}
    rows_at = run_starts(sweep, wanted, "recipes", splits_of(TWO_SHARES))
    lines = [title_of(sweep, "Recipes"), "",
             "| share | recipe | valid recall@20 | by seed | scale | pre-training epochs | "
             "one ranking | like popularity | dead |", "|---" * 9 + "|"]
    for share, rows in rows_at.items():
        for name, row in rows.items():
            recalls = [validation_recall(outcome) for outcome in row.found]
            reports = [outcome["report"] for outcome in row.found]
            shared = np.mean([report["shared_ranking"] for report in reports])
            like_popularity = np.mean([report["popularity_correlation"] for report in reports])
            dead = set().union(*map(dead_modalities, reports))
            texts = [share, name, f"{np.mean(recalls):.4f}",
                     " ".join(f"{recall:.4f}" for recall in recalls),
                     scale_name(row.cells[0].finetuning),
                     " ".join(str(report["epoch"]) for report in reports),
                     f"{shared:.2f}", f"{like_popularity:.2f}", ", ".join(sorted(dead))]
            lines.append("| " + " | ".join(texts) + " |")
    lines += ["", "one ranking: the part of the scores' variance that is the same for all users, "
                  "of the tables as they are handed over; like popularity: the rank correlation "
                  "of that ranking with popularity; dead: modalities whose attention or variance "
                  f"is below {diagnostics.DEAD:g} in any seed."]
    sweep.show("recipe", lines)


def dead_modalities(report):
    """The modalities that mmcpr.py warns of, each as "user G"."""
    names = []
    for side, modalities in report["modalities"].items():
        for modality, state in modalities.items():
            if diagnostics.is_dead(state):
                names.append(f"{side} {modality}")
    return names


# --- Figures ------------------------------------------------------------------------------

def curve(histories, key):
    """(epochs, values: per epoch one of each seed), up to the end of the shortest run."""
    epochs, values = [], []
    for points in zip(*histories):
        epochs.append(points[0]["epoch"])
        values.append([point[key] for point in points])
    return epochs, values


def fig3(sweep):
    choice = choose(sweep, ["mmcpr"])["mmcpr"]
    command = sweep.pretraining("mmcpr", *choice.rate)
    wanted = {}
    for subset in ("T", "V", "R", "G", "TV", "RTV", "TG", "VG", "RG", "TVG", "RTVG"):
        if set(subset) == set(sweep.letters):
            wanted[subset] = (command, choice.scale)  # all that there is: the cells of Table 2
        elif set(subset) < set(sweep.letters):
            wanted[subset] = ((*command, "--modalities", subset), choice.scale)
    # A control: another item's contents tell items apart just as well, but say nothing of them.
    if sweep.contents:
        flags = ("--modalities", sweep.contents, "--shuffle-contents")
        wanted[f"{sweep.contents} shuffled"] = ((*command, *flags), choice.scale)
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
        of_seeds = [outcome["report"]["modalities"][side][modality] for outcome in row.found]
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
        panels[metric] = {"all rows": (list(rows), values)}
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
    """The pre-training of the first seed, of all rows but the pairs of modalities."""
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
            # The default λ is not spelt out, so that the .csv names the run as Table 2's does.
            flags = () if float(lam) == mmcpr.DEFAULTS["lam"] else ("--lam", lam)
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
            column[name] = f"{np.mean([bce_share(outcome) for outcome in row.found]):.2f}"
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
        # The controls have no λ: each is a line from end to end.
        for name, row in controls.items():
            curves[name] = ([0, 1], [test_values(row, metric)] * 2)
        panels[metric] = curves
    plot(sweep.folder / "fig4.png", panels, draw_lines, "λ")


def bce_share(outcome):
    """The BCE that was reached, as a share of that of item popularity alone."""
    return outcome["report"]["losses"]["bce"] / outcome["report"]["popularity_loss"]


# --- The command line ---------------------------------------------------------------------

TARGETS = {"table1": table1, "table2": table2, "table3": table3, "fig3": fig3, "fig4": fig4,
           "scale": scale_of_start, "regimes": regimes,
           "paper-recipe": regimes_by_papers_recipe, "new-items": new_items, "recipe": recipe}


def rate(text):
    """argparse type: a learning rate, as it was written."""
    if not 0 < float(text) < np.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return text


def share(text):
    """argparse type: a share above 0 and up to 1, in one spelling: ".2", "1"."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return f"{float(text):g}".removeprefix("0")


def arguments():
    parser = run.parser("Make the paper's tables and figures.",
                        "python -m paper.reproduce")
    parser.add_argument("target", choices=(*TARGETS, "all"),
                        help="what to make; the head of paper/reproduce.py says what each is")
    parser.add_argument("--seeds", type=run.non_negative, nargs="+", default=[0, 1, 2],
                        help="one pre-training and one split each")
    parser.add_argument("--rates", type=rate, nargs="+", default=GRID,
                        help="learning rates to choose from; the default is the paper's grid")
    parser.add_argument("--patience", type=run.positive,
                        help="of mmcpr.py, in epochs; the default is its own")
    parser.add_argument("--epochs", type=run.positive,
                        help="of baselines.py, at most; the default is its own")
    parser.add_argument("--shares", type=share, nargs="+", default=SHARES,
                        help="of each user's training interactions, for regimes "
                        "(default: .1 .2 .4 .7 1)")
    parser.add_argument("--scales", choices=SCALES, nargs="+", default=list(SCALES),
                        help="of the start of fine-tuning, to choose from")
    parser.add_argument("--systems", choices=OTHERS, nargs="+", default=list(OTHERS),
                        help="of table2, beside the controls and MMCPR")
    parser.add_argument("--jobs", type=run.positive, default=1,
                        help="scripts at a time; they share the cores")
    parser.add_argument("--results", default="results",
                        help="where tables, figures and cells are kept")
    data.add_data_arguments(parser)
    data.add_feature_arguments(parser)
    return parser


def check_arguments(args):
    for flag, values in (("--seeds", args.seeds), ("--rates", args.rates),
                         ("--shares", args.shares)):
        if len(set(map(float, values))) < len(values):
            raise run.InputError(f"{flag} names one twice")
    if args.keep is not None or args.new_items is not None:
        raise run.InputError("--keep and --new-items are set by the targets regimes and new-items; "
                             "leave them out")
    if args.valid == 0:
        raise run.InputError("--valid 0 leaves nothing to choose learning rate and scale by")


def as_flags(options):
    """{"min_count": 5} -> ["--min-count=5"]; an option that is None is left out."""
    flags = []
    for name, value in options.items():
        if value is not None:
            flags.append(f"--{name.replace('_', '-')}={value}")
    return flags


def changed_settings(args, data_options):
    """The data and feature options that are not the default, as text for the titles."""
    text = ""
    for name, default in data.DATA_DEFAULTS.items():
        # The data's name stands in the title anyway, and where it lies does not matter.
        if name not in ("data", "data_dir") and data_options[name] != default:
            text += f", {name.replace('_', ' ')} {data_options[name]}"
    for name in data.ENCODING:
        if getattr(args, name) != arguments().get_default(name):
            text += f", {name.replace('_', ' ')} {getattr(args, name)}"
    return text


def open_sweep(args):
    """Opens the data and encodes it once, before the cells ask for it."""
    dataset, parts, data_options = data.open_data(args)
    label = os.path.basename(data_options["data"]).replace(":", "_")
    folder = Path(args.results) / label
    settings = changed_settings(args, data_options)
    disk.check_outputs([folder / "table1.md"])
    if os.path.exists(args.clip_weights):
        # The scripts run in another folder.
        args.clip_weights = os.path.abspath(args.clip_weights)
    features = data.features(dataset, "TVR", args.encoder, Path(data_options["data_dir"]),
                             (args.clip_model, args.clip_weights), "cpu")
    data_flags = as_flags(data_options | {"amazon_url": args.amazon_url})
    encoding_flags = as_flags({name: getattr(args, name) for name in data.ENCODING})
    # The hash of the split and the features gives cells of other data other names.
    fingerprint = checkpoints.run_id({}, parts, features.values())
    cells = Cells(data_flags, encoding_flags, fingerprint, folder, args.jobs)
    letters = "".join(letter for letter in "RTV" if letter in features) + "G"
    scales = [SCALES[name] for name in args.scales]
    systems = {}
    for name, method in SYSTEMS.items():
        if method not in OTHERS or method in args.systems:
            systems[name] = method
    return Sweep(cells=cells, folder=folder, label=label, seeds=args.seeds, rates=args.rates,
                 patience=args.patience, epochs=args.epochs, settings=settings, dataset=dataset,
                 split_seed=data_options["split_seed"], new_splits=not data_options["sample"],
                 letters=letters, shares=args.shares, scales=scales, systems=systems)


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
    text = f"wrote {sweep.folder}"
    if args.target in ("regimes", "all"):
        text += (f"; next: python -m paper.map {shlex.quote(sweep.label)} "
                 f"--results {shlex.quote(args.results)}")
    print(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run.cli(main))
