"""Every table and figure of the paper: python reproduce.py table2 --data demo --seeds 0 1 2 3 4

    table1    counts of the data set                     table2    all systems of baselines.py beside MMCPR
    table3    MMCPR without CIMA, without BCE            fig3      subsets of the modalities
    scale     what share is only scale and smoothing     fig4      the loss weight, both forms of CIMA
    all       all of them

A cell is one pre-training and one fine-tuning, by the commands a reader would type. What it found is kept as JSON in
results/<data>/cells, named after all options of those commands, the split and the features (not after the code: after a change
of that, name another --results): an interrupted sweep goes on, a second call only prints. <target>.csv lists the runs behind
a table, those of the choice too, one row a seed. Pre-training is repeated for every seed, the split stays. Each system's learning
rate, of the paper's grid, and the scale at which its tables are handed over, as they are or Xavier's, are chosen on the first seed
by the validation Recall@20 after fine-tuning; variants of MMCPR keep MMCPR's.
"""
import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

import baselines
import data
import finetune
import mmcpr

HERE = Path(__file__).resolve().parent
GRID = ("1e-4", "1e-3", "1e-2")
SCALES = ((), ("--scale", "xavier"))  # of the tables to start from: as they are, or brought to a random start's
METRICS = [f"{name}@{k}" for name in ("recall", "ndcg") for k in (20, 40, 60)]
SYSTEMS = {"Random": "random", "CLIP": "clip", "MMGCN": "mmgcn", "GPT-GNN": "gptgnn", "Graph-BERT": "graphbert", "PMGT": "pmgt",
           "GCN-P": "gcnp", "MMCPR": "mmcpr"}
PAPER = {  # Recall@20 of the paper's Table 2
    "vg": (.1571, .1712, .1703, .1659, .1696, .1718, .1916, .1939), "tg": (.0876, .0967, .0966, .0931, .1034, .1024, .1025, .1067),
    "sharee": (.1059, .1135, .1106, .1090, .1074, .1077, .1382, .1392)}
PAPER_ABLATION = {"vg": (.1898, .1729, .1939), "tg": (.1051, .0974, .1067), "sharee": (.1316, .1143, .1392)}  # of its Table 3
ENCODING = ("encoder", "clip_model", "clip_weights")
UNTRAINED = ("--lr", "1e-9", "--epochs", "1", "--eval-every", "1")  # the towers as they are drawn
P_VALUE = "p: paired t-test over the seeds of one split, uncorrected."


# --- Cells ----------------------------------------------------------------------------------------------------------

# What the scripts say where the data has nothing for a cell, and where the learning rate is too high
NOTHING, DIVERGED = ("nothing for --method", "--lam 1 trains CIMA alone"), "not finite"


def options(command):
    """All options of a command of the project, defaults too."""
    script, *flags = command
    parser = {"mmcpr.py": mmcpr, "baselines.py": baselines, "finetune.py": finetune}[script].arguments()
    return script, {name: value for name, value in vars(parser.parse_args(flags)).items() if not name.startswith(("data", "device"))}


class Cells:
    """Runs cells, `jobs` at a time, and keeps what they found."""

    def __init__(self, source, encoding, fingerprint, folder, jobs):
        """source, encoding: the flags that say which data and features, the same for all; fingerprint: of these; folder:
        results/<data>."""
        self.source, self.encoding, self.fingerprint, self.folder, self.jobs = source, encoding, fingerprint, folder.resolve(), jobs
        for name in ("cells", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.locks, self.running, self.used = defaultdict(threading.Lock), set(), {}
        self.starting, self.stopped = threading.Lock(), False
        self.environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ

    def name(self, *commands, seed):
        known = [self.fingerprint, seed, *(command and options(command) for command in commands)]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def command(self, script, *flags):
        """Runs one of the project's scripts; InputError with its own last line where it fails."""
        with self.starting:  # so that a sweep that is being stopped knows of every process
            if self.stopped:
                raise data.InputError(f"{script}: not started; the sweep was interrupted")
            process = subprocess.Popen([sys.executable, str(HERE / script), *flags], env=self.environment, cwd=self.folder / "cells",
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # there finetune.py's checkpoint lies
            self.running.add(process)
        message = process.communicate()[1].strip().splitlines()
        self.running.discard(process)
        if process.returncode:
            raise data.InputError(f"{script} {' '.join(flags)}: {(message or ['no message'])[-1]}")

    def run(self, pretraining, finetuning, seed, may_diverge=False):
        """One cell: (command of mmcpr.py or baselines.py, or None for a random start; flags of finetune.py; seed) -> its JSON.

        None where the data has nothing for it, and, if may_diverge, where the learning rate is too high for it.
        """
        path = self.folder / "cells" / f"{self.name(pretraining, ('finetune.py', *finetuning), seed=seed)}.json"
        if path.exists():
            try:
                cell = json.loads(path.read_text())
                whole = cell is None or "diverged" in cell or "report" in cell and cell["finetune"]["test"]
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise data.InputError(f"{path}: damaged; delete it and run the same command again")
        else:
            cell = self.make(pretraining, finetuning, seed, path)
            data.replace_file(path, lambda file: json.dump(cell, file, indent=1), "w")
        if cell and "diverged" in cell:
            if not may_diverge:
                raise data.InputError(cell["diverged"])
            return None
        return cell

    def make(self, pretraining, finetuning, seed, path):
        """What run keeps at `path`: what the commands found, None for nothing to do, {"diverged": message}."""
        init, report = "random", None
        try:
            if pretraining:
                init = self.folder / "tables" / f"{self.name(pretraining, seed=seed)}.npz"
                with self.locks[init.name]:  # another cell may want the same tables
                    if not init.exists():
                        part = init.with_suffix(".part.npz")  # an interrupted pre-training writes its best so far
                        resume = ("--resume",) if pretraining[0] == "mmcpr.py" else ()
                        self.command(*pretraining, *self.source, *self.encoding, "--seed", str(seed), "--out", str(part), *resume)
                        os.replace(part, init)
                try:
                    meta = data.load_embeddings(init)["meta"]
                except data.InputError:
                    raise data.InputError(f"{init}: damaged; delete it and run the same command again") from None
                report = meta["report"] | {"method": meta["method"]}
            found = path.with_suffix(".found")
            self.command("finetune.py", "--init", str(init), *self.source, *finetuning, "--seeds", str(seed), "--metrics", str(found),
                         "--resume")
        except data.InputError as error:
            if any(words in str(error) for words in NOTHING):
                return None
            if DIVERGED in str(error):
                return {"diverged": str(error)}
            raise
        results = json.loads(found.read_text()) | {"data": self.folder.name, "init": init if init == "random" else init.name}
        found.unlink()
        return {"pretraining": pretraining, "finetuning": finetuning, "seed": seed, "report": report, "finetune": results}

    def all(self, wanted, what, may_diverge=False):
        """The cells of a list of (pretraining, finetuning, seed), in order, with a bar over those that must be run."""
        with ThreadPoolExecutor(self.jobs) as pool:
            once = {cell: pool.submit(self.run, *cell, may_diverge) for cell in dict.fromkeys(wanted)}
            futures = list(once.values())
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc=what, unit="cell"):
                    future.result()
            except BaseException as error:
                for future in futures:
                    future.cancel()
                if isinstance(error, KeyboardInterrupt):  # where a cell failed, the others that are running finish
                    with self.starting:
                        self.stopped = True
                    for process in list(self.running):  # mmcpr.py and finetune.py save a checkpoint
                        process.terminate()
                raise
            self.used |= {cell: future.result() for cell, future in once.items()}
            return [self.used[cell] for cell in wanted]


def pretraining(system, *flags):
    """The command that makes a system's tables; None for a random start."""
    if system == "random":
        return None
    return ("mmcpr.py", *flags) if system == "mmcpr" else ("baselines.py", "--method", system, *flags)


def choose(cells, systems, args):
    """{system: [flags of its pre-training, flags of finetune.py]}: learning rate and scale of the start.

    Of all pairs of args.rates and SCALES the one with the best validation Recall@20 after fine-tuning, on the first seed.
    """
    patience = ("--patience", str(args.patience)) if args.patience else ()
    rates = {system: [("--lr", lr, *patience) for lr in args.rates] if system not in ("random", "clip") else [()] for system in systems}
    grid = [(system, rate, scale) for scale in SCALES for system in systems for rate in rates[system] if system != "random" or not scale]
    found = cells.all([(pretraining(system, *rate), scale, args.seeds[0]) for system, rate, scale in grid], "learning rate and scale",
                      may_diverge=True)
    value = lambda trial: trial[1]["finetune"]["valid"]["recall@20"] if trial[1] else -1
    chosen = {}
    for (system, *pair), _ in sorted(zip(grid, found), key=value, reverse=True):
        chosen.setdefault(system, pair)
    return chosen


def mmcpr_as_chosen(cells, args):
    """(function: flags -> the command that pre-trains MMCPR with them, flags of finetune.py), as validation chose them."""
    rate, scale = choose(cells, ["mmcpr"], args)["mmcpr"]
    return lambda *flags: pretraining("mmcpr", *rate, *flags), scale


# --- Tables ---------------------------------------------------------------------------------------------------------

def test(cells, metric):
    """[n_seeds] of one test metric."""
    return np.array([cell["finetune"]["test"][metric] for cell in cells])


def runs(used):
    """The rows of <target>.csv, of {(pretraining, finetuning, seed): cell}: what a paired comparison with another system needs."""
    yield "pretraining", "finetuning", "seed", "epoch", "valid recall@20", *METRICS
    for (pretraining, finetuning, seed), cell in used.items():
        if cell:
            found = cell["finetune"]
            yield (" ".join(pretraining or ("random",)), " ".join(("finetune.py", *finetuning)), seed, found["epoch"],
                   *(f"{x:.6f}" for x in (found["valid"]["recall@20"], *(found["test"][metric] for metric in METRICS))))


def course(histories, key):
    """([epoch], [[n_seeds] of a value per epoch]) of the seeds' histories, as far as all of them go: a curve for plot."""
    points = list(zip(*histories))
    return [point[0]["epoch"] for point in points], [[seed[key] for seed in point] for point in points]


def spread(values):
    return f"{values.mean():.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else "")


def gain(ours, other):
    """The relative gain with its paired t-test over seeds."""
    text = f"{ours.mean() / other.mean() - 1:+.1%}"
    if len(ours) < 2 or np.ptp(ours - other) < 1e-9:
        return text
    p = stats.ttest_rel(ours, other).pvalue
    return f"{text} (p < 0.001)" if p < 0.001 else f"{text} (p = {p:.3f})"


def table(title, args, rows, extra=()):
    """Markdown of rows {name: cells}; extra: [(name of a last column, {row: text})]. The title names what is not the default."""
    budget = "" if tuple(args.rates) == GRID else f", rates {' '.join(args.rates)}"
    budget += f", patience {args.patience}" if args.patience else ""
    lines = [f"# {title}, {args.label}, seeds {' '.join(map(str, args.seeds))}{budget}{args.settings}", "",
             "| | " + " | ".join([*METRICS, *(name for name, _ in extra)]) + " |", "|---" * (1 + len(METRICS) + len(extra)) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join([*(spread(test(cells, metric)) for metric in METRICS),
                                                  *(column.get(name, "") for _, column in extra)]) + " |")
    return lines


def paper_column(names, values):
    """The extra column of the paper's Recall@20; none where the paper does not have the data set."""
    return [("paper, recall@20", {name: f"{value:.4f}" for name, value in zip(names, values)})] if values else []


def rms(cells):
    """The RMS of the tables as they were handed over, of the first seed."""
    return f"{cells[0]['report']['rms']['all']:.4g}"


def by_row(names, found):
    """{name: its cells} of a list of cells, all seeds of a name side by side; without those that the data has nothing for."""
    seeds = len(found) // len(names)
    return {name: found[seeds * n:seeds * (n + 1)] for n, name in enumerate(names) if all(found[seeds * n:seeds * (n + 1)])}


def table1(cells, args, show):
    n, users, items = len(args.dataset.users), args.dataset.n_users, args.dataset.n_items
    show("table1", [f"# Table 1{args.settings}", "", "| data | users | items | interactions | sparsity |", "|---|---|---|---|---|",
                    f"| {args.label} | {users:,} | {items:,} | {n:,} | {1 - n / users / items:.2%} |"])


def table2(cells, args, show):
    chosen = choose(cells, SYSTEMS.values(), args)
    wanted = [(pretraining(system, *chosen[system][0]), chosen[system][1], seed) for system in SYSTEMS.values() for seed in args.seeds]
    found = cells.all(wanted, "table 2")
    rows = by_row(SYSTEMS, found)
    label = lambda name, row: "text+image" if name == "CLIP" and row[0]["report"]["method"] == "text+image" else name
    systems = {label(name, row): SYSTEMS[name] for name, row in rows.items()}
    rows = {label(name, row): row for name, row in rows.items()}
    again = cells.all([(None, ("--scale", rms(rows["MMCPR"])), seed) for seed in args.seeds], "Random at MMCPR's RMS")
    ours = {"MMCPR": rows.pop("MMCPR")}
    if "R" in ours["MMCPR"][0]["report"]["attention"]["user"]:  # which only GCN-P reads besides
        without = pretraining("mmcpr", *chosen["mmcpr"][0], "--modalities", "TVG")
        found = cells.all([(without, chosen["mmcpr"][1], seed) for seed in args.seeds], "without reviews")
        ours = {"MMCPR without reviews": found, **ours}
        systems["MMCPR without reviews"] = "mmcpr"
    others = {metric: max(rows, key=lambda name: test(rows[name], metric).mean()) for metric in ("recall@20", "ndcg@20")}
    rows = {"Random": rows["Random"], "Random at the RMS of MMCPR as is": again} | rows | ours
    rate = {name: " ".join(chosen[system][0][1:2]) for name, system in systems.items()}
    start = {name: "Xavier's" if chosen[system][1] or system == "random" else "as is" for name, system in systems.items()}
    has_users = lambda row: row[0]["report"] is not None and "user" in row[0]["report"]["rms"]
    users = {name: "its own" if has_users(row) else "random" for name, row in rows.items()}
    extra = [("users", users), ("lr", rate), ("scale", start), *paper_column(SYSTEMS, PAPER.get(args.label, ()))]
    lines = [*table("Table 2", args, rows, extra), ""]
    for name in ours:
        for metric, best in others.items():
            value, other, random = (test(rows[row], metric) for row in (name, best, "Random"))
            lines.append(f"- {name}, {metric}: over Random {gain(value, random)}; over the best other, {best}, {gain(value, other)}")
    lines += ["", P_VALUE + " The best other is the best on test. users: where a system brings none, fine-tuning starts them at random."]
    show("table2", lines)


def table3(cells, args, show):
    command, start = mmcpr_as_chosen(cells, args)
    names = ("w/o CIMA (λ = 0)", "w/o BCE (λ = 1)", "MMCPR")
    variants = dict(zip(names, (("--lam", "0"), ("--lam", "1"), ()))) if args.pairs else {"MMCPR": ()}
    found = cells.all([(command(*flags), start, seed) for flags in variants.values() for seed in args.seeds], "table 3")
    rows = by_row(variants, found)
    against = [(f"{metric} against MMCPR", {name: gain(test(row, metric), test(rows["MMCPR"], metric)) for name, row in rows.items()
                                            if name != "MMCPR"}) for metric in ("recall@20", "ndcg@20")]
    extra = [*against, *paper_column(names, PAPER_ABLATION.get(args.label, ()))]
    show("table3", [*table("Table 3", args, rows, extra), "", P_VALUE])


def scale(cells, args, show):
    """What is left of the gain where both starts have one scale, and where the towers are not trained at all.

    Not trained, they still hand over averages over co-interaction neighbours and projected contents, and not noise.
    """
    command, _ = mmcpr_as_chosen(cells, args)
    run = lambda command, *flags: cells.all([(command, flags, seed) for seed in args.seeds], "scale")
    rows, towers = {}, {"MMCPR": command()} | ({"w/o CIMA": command("--lam", "0")} if args.pairs else {})
    for name, ours in towers.items():
        rows |= {f"{name}, as is": run(ours), f"{name}, to Xavier's RMS": run(ours, "--scale", "xavier")}
    rows["MMCPR not trained, to Xavier's RMS"] = run(pretraining("mmcpr", *UNTRAINED), "--scale", "xavier")
    rows |= {"Random, Xavier": run(None), "Random, at the RMS of MMCPR as is": run(None, "--scale", rms(rows["MMCPR, as is"]))}
    show("scale", table("Scale of the start", args, rows))
    curves = {name: course([cell["finetune"]["history"] for cell in row], "recall@20") for name, row in rows.items() if "CIMA" not in name}
    plot(args.folder / "scale.png", {"validation Recall@20": curves}, "epoch of fine-tuning")


# --- Figures --------------------------------------------------------------------------------------------------------

def plot(path, panels, xlabel=""):
    """One panel per entry {title: {curve: (x, [n_seeds of values] per x)}}: means and standard deviations over seeds.

    Where x are names: bars, or a point for every seed where several curves share the names.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        for label, (x, values) in curves.items():
            mean, deviation = [np.mean(v) for v in values], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            bars = {"yerr": deviation, "capsize": 3} if any(deviation) else {}
            if isinstance(x[0], str) and len(curves) == 1:
                axis.bar(x, mean, **bars)
                axis.set_ylim(0.9 * min(mean))  # as the paper cuts its bars
            elif isinstance(x[0], str):  # of every seed: they may fall on either side of a mean
                axis.plot(np.repeat(x, [len(v) for v in values]), np.concatenate(values), "o", label=label, color=f"C{'RTVG'.index(label)}")
            else:
                axis.errorbar(x, mean, marker="o" if len(x) < 20 else "", label=label, **bars)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    figure.tight_layout()
    data.replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def fig3(cells, args, show):
    command, start = mmcpr_as_chosen(cells, args)
    full = cells.run(command(), start, args.seeds[0])["report"]["attention"]
    there = {m for side in full.values() for m in side}
    subsets = [s for s in ("T", "V", "R", "G", "TV", "TG", "VG", "RG", "TVG", "RTVG") if set(s) <= there]
    flags = lambda subset: () if set(subset) == there else ("--modalities", subset)  # all that there is: the cells of Table 2
    found = cells.all([(command(*flags(subset)), start, seed) for subset in subsets for seed in args.seeds], "figure 3")
    rows = by_row(subsets, found)
    subsets = list(rows)
    attention = {(subset, side): {m: [cell["report"]["attention"][side][m] for cell in rows[subset]] for m in
                                  rows[subset][0]["report"]["attention"][side]} for subset in subsets for side in ("user", "item")}
    column = {subset: "; ".join(f"{side} " + " ".join(f"{m} {np.mean(w):.2f}" for m, w in attention[subset, side].items())
                                for side in ("user", "item") if attention[subset, side]) for subset in subsets}
    lines = table("Figure 3", args, rows, [("mean attention where present", column)])
    show("fig3", [*lines, "", "A side that a subset leaves with nothing (users under T, V, TV; items under R) has a trained table instead."])
    plot(args.folder / "fig3.png", {metric: {"MMCPR": (subsets, [test(rows[s], metric) for s in subsets])} for metric in ("recall@20", "ndcg@20")})
    panels = {}
    for side in ("user", "item"):
        shown = [s for s in subsets if attention[s, side]]
        panels[f"mean attention, {side}s"] = {m: (shown, [attention[s, side].get(m, [np.nan]) for s in shown])
                                              for m in "RTVG" if any(m in attention[s, side] for s in shown)}
    plot(args.folder / "attention.png", {title: curves for title, curves in panels.items() if curves})
    curves = {"loss per positive (BCE)": "bce", "validation Recall@20": "recall@20"}
    plot(args.folder / "training.png", {title: {subset: course([cells_[0]["report"]["history"]], key) for subset, cells_ in rows.items()
                                                if len(subset) != 2} for title, key in curves.items()}, "epoch")


def fig4(cells, args, show):
    if not args.pairs:
        print("figure 4: no items with both text and image, so CIMA and its weight do nothing")
        return
    command, start = mmcpr_as_chosen(cells, args)
    weights = ("0", "0.2", "0.4", "0.6", "0.8", "1")
    points = [(form, lam) for form in ("softmax", "bce") for lam in weights]
    flags = lambda form, lam: (*(("--lam", lam) if lam != "0.2" else ()), *(("--cima", form) if form == "bce" and lam != "0" else ()))
    found = cells.all([(command(*flags(*point)), start, seed) for point in points for seed in args.seeds], "figure 4")
    rows = by_row([f"{form}, λ = {lam}" for form, lam in points], found)
    column = {name: f"{np.mean([cell['report']['losses']['bce'] / cell['report']['popularity_loss'] for cell in row]):.2f}"
              for name, row in rows.items() if "λ = 1" not in name}
    show("fig4", table("Figure 4", args, rows, [("BCE, of that of popularity alone", column)]))
    plot(args.folder / "fig4.png", {metric: {form: ([float(lam) for f, lam in points if f == form and f"{f}, λ = {lam}" in rows],
                                                    [test(rows[f"{f}, λ = {lam}"], metric) for f, lam in points
                                                     if f == form and f"{f}, λ = {lam}" in rows])
                                             for form in ("softmax", "bce")} for metric in ("recall@20", "ndcg@20")}, "λ")


# --- The command line -----------------------------------------------------------------------------------------------

def rate(text):
    """argparse type: a learning rate, as it was written."""
    if not 0 < float(text) < np.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return text


TARGETS = {"table1": table1, "table2": table2, "table3": table3, "fig3": fig3, "fig4": fig4, "scale": scale}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the paper's tables and figures.", formatter_class=data.Help)
    parser.add_argument("target", choices=(*TARGETS, "all"))
    parser.add_argument("--seeds", type=data.non_negative, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=rate, nargs="+", default=GRID, help="learning rates to choose from; the default is the paper's grid")
    parser.add_argument("--patience", type=data.positive, help="of every pre-training, in epochs; the default is that of the scripts")
    parser.add_argument("--jobs", type=data.positive, default=1, help="cells at a time; they share the cores")
    parser.add_argument("--results", default="results", help="where tables, figures and cells are kept")
    data.add_data_arguments(parser)
    data.add_feature_arguments(parser)
    args = parser.parse_args(argv)
    for name, values in (("--seeds", args.seeds), ("--rates", list(map(float, args.rates)))):
        if len(set(values)) < len(values):
            raise data.InputError(f"{name} names one twice")
    if args.valid == 0:
        raise data.InputError("--valid 0 leaves nothing to choose learning rate and scale by")
    args.dataset, parts, options = data.open_data(args)
    args.label = os.path.basename(options["data"]).replace(":", "_")
    args.folder = Path(args.results) / args.label
    changed = {name: options[name] for name in ("valid", "split_seed", "min_count", "sample") if options[name] != data.DATA_DEFAULTS[name]}
    changed |= {name: getattr(args, name) for name in ENCODING if getattr(args, name) != parser.get_default(name)}
    args.settings = "".join(f", {name.replace('_', ' ')} {value}" for name, value in changed.items())
    if os.path.exists(args.clip_weights):
        args.clip_weights = os.path.abspath(args.clip_weights)  # the scripts run in another folder
    data.check_outputs(args.folder / "table1.md")
    # Encoded once, before the cells ask for them
    features = data.features(args.dataset, "TVR", args.encoder, Path(options["data_dir"]), (args.clip_model, args.clip_weights))
    args.pairs = {"T", "V"} <= features.keys()
    flags = lambda options: [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    encoding = flags({name: getattr(args, name) for name in ENCODING})
    source = flags(options | {"amazon_url": args.amazon_url})
    cells = Cells(source, encoding, mmcpr.digest({}, parts, features.values()), args.folder, args.jobs)

    def show(name, lines):
        data.replace_file(args.folder / f"{name}.md", lambda file: file.write("\n".join(lines) + "\n"), "w")
        print("\n".join(["", *lines, ""]), flush=True)

    for name in TARGETS if args.target == "all" else (args.target,):
        cells.used.clear()
        TARGETS[name](cells, args, show)
        if cells.used:
            data.replace_file(args.folder / f"{name}.csv", lambda file: csv.writer(file, lineterminator="\n").writerows(runs(cells.used)), "w")
    again = " ".join("all" if word == args.target else word for word in (sys.argv[1:] if argv is None else argv))
    print(f"wrote {args.folder}" + (f"; next: python reproduce.py {again}" if args.target != "all" else ""))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(data.cli(main))
