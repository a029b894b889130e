"""The map in one figure: where pre-training pays, of several data sets side by side.

    python -m paper.reproduce regimes --data demo
    python -m paper.map demo

Reads results/<data>/regimes.csv, which `paper.reproduce regimes` writes, and makes
results/map.png: test Recall@20 against the share of the training interactions that is kept.
"""
import csv
import re
import sys
from pathlib import Path

import run  # before the libraries: from here on Ctrl-C ends in one line

import disk
from paper.figures import draw_lines, plot

COLUMNS = {"pretraining", "finetuning", "data", "seed", "valid recall@20", "recall@20"}

# {pre-training of a start: its label, in figures.STYLES}
LABELS = {
    "baselines.py --method popular": "Most popular",
    "random": "Random",
    "baselines.py --method constant": "Constant",
    "mmcpr.py --modalities none": "Eq. 15 alone",
    "mmcpr.py --modalities G": "Graphs alone",
    "contents": "Contents alone",
    "mmcpr.py": "MMCPR",
}


def read_curves(path):
    """{start: (shares, values: per share one of each seed)} of a regimes.csv."""
    rows = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    if not rows or not COLUMNS <= set(rows[0]):
        raise run.InputError(f"{path}: not there, or not written by python -m paper.reproduce "
                             "regimes; run that first")
    by_start = {}
    for row in rows:
        start = re.sub(" --patience \\d+", "", row["pretraining"])
        letters = start.removeprefix("mmcpr.py --modalities ")
        if letters != start and letters not in ("none", "G"):
            start = "contents"
        point = by_start.setdefault(start, {}).setdefault(share_of(row), {})
        point.setdefault(row["finetuning"], []).append(row)
    curves = {}
    for start, points in by_start.items():
        shares = sorted(points)
        curves[start] = (shares, [chosen_values(points[share]) for share in shares])
    return curves


def share_of(row):
    flags = row["data"].split()
    return float(flags[flags.index("--keep") + 1]) if "--keep" in flags else 1.0


def chosen_values(by_scale):
    """The seeds' test Recall@20 at the scale that the first seed's validation chose."""
    # rows[0] is the first seed's trial. Only the chosen scale has the other seeds too; with one
    # seed its validation decides.
    rows = max(by_scale.values(), key=lambda rows: (len(rows), float(rows[0]["valid recall@20"])))
    return [float(row["recall@20"]) for row in rows]


def draw(path, curves_of):
    """A panel for each of {data: its curves}, into a PNG."""
    panels = {}
    for name, curves in curves_of.items():
        panels[name] = {LABELS[start]: curves[start] for start in LABELS if start in curves}
    plot(path, panels, draw_lines, "share of the training interactions",
         "test Recall@20 after fine-tuning", width=4, n_columns=min(3, len(panels)))


def main(argv=None):
    parser = run.parser("Draw the maps of several data sets side by side.",
                        "python -m paper.map")
    parser.add_argument("data", nargs="+", help="names of folders in --results")
    parser.add_argument("--results", default="results", help="where they are")
    args = parser.parse_args(argv)
    results = Path(args.results)
    path = results / "map.png"
    disk.check_outputs([path])
    draw(path, {name: read_curves(results / name / "regimes.csv") for name in args.data})
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
