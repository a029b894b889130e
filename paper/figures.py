"""Figures with matplotlib: panels side by side, error bars over seeds, into a PNG."""
import numpy as np

import disk

# {start of fine-tuning: (its colour, its line)}, the same in all figures; controls are not solid.
STYLES = {
    "Most popular": ("0.75", "-."),
    "Random": ("0.6", ":"),
    "Constant": ("0.3", "--"),
    "Eq. 15 alone": ("C4", "--"),
    "Graphs alone": ("C0", "-"),
    "Contents alone": ("C2", "-"),
    "MMCPR": ("C3", "-"),
}


def style_of(label):
    """Keyword arguments of matplotlib: of one of STYLES, as in "Contents alone (TV)", or none."""
    start = label.split(" (")[0]
    if start not in STYLES:
        return {}
    color, line = STYLES[start]
    return {"color": color, "ls": line}


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
        # Bars that start at 0 would all look the same; the paper cuts its bars too.
        axis.set_ylim(0.9 * min(means))
    tilt_names(axis)


def tilt_names(axis):
    """Turns the names below a panel, which side by side would overlap."""
    for label in axis.get_xticklabels():
        label.set(rotation=60, ha="right")


def draw_points(axis, curves):
    """A point for every seed: seeds may lie on both sides of a mean, and none near it."""
    for modality, (names, values) in curves.items():
        color = f"C{'RTVG'.index(modality)}"
        x = np.repeat(names, [len(of_seeds) for of_seeds in values])
        axis.plot(x, np.concatenate(values), "o", label=modality, color=color)
    tilt_names(axis)


def draw_lines(axis, curves):
    for label, (x, values) in curves.items():
        means, error_bars = means_and_bars(values)
        marker = "o" if len(x) < 20 else ""
        axis.errorbar(x, means, marker=marker, ms=3, label=label, **style_of(label), **error_bars)


def plot(path, panels, draw, xlabel="", ylabel="", width=5, n_columns=None):
    """A PNG with one panel per entry of {title: {curve: (x, per x one value of each seed)}}.

    ylabel: of all panels; width: of each, in inches; n_columns: of panels, by default all.
    """
    figure, axes = open_figure(len(panels), width, n_columns or len(panels))
    for axis, (title, curves) in zip(axes, panels.items()):
        draw(axis, curves)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    if ylabel:
        figure.supylabel(ylabel)
    legend_below(figure, axes)
    save_figure(path, figure)


def legend_below(figure, axes):
    """One legend of all panels' curves, below them: inside a panel it would hide curves."""
    handles = {}
    for axis in axes:
        lines, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, lines))
    if len(handles) < 2:
        figure.tight_layout()
        return
    # A letter is about 0.08 inches wide; the line before a label takes 0.6.
    width = 0.6 + 0.08 * max(len(label) for label in handles)
    n_columns = int(max(1, min(4, figure.get_figwidth() // width)))
    n_rows = -(-len(handles) // n_columns)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=n_columns,
                  frameon=False)
    # The figure grows by the legend's inches, so that the panels keep theirs.
    below = 0.225 * n_rows
    height = figure.get_figheight() + below
    figure.set_figheight(height)
    figure.tight_layout(rect=(0, below / height, 1, 1))


def open_figure(n_panels, width, n_columns):
    """(figure, its panels): each `width` inches wide, n_columns of them side by side."""
    # Imported here: it takes a second, and most calls plot nothing.
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    n_rows = -(-n_panels // n_columns)
    figure, axes = pyplot.subplots(n_rows, n_columns, figsize=(width * n_columns, 3.6 * n_rows),
                                   squeeze=False)
    for unused in axes.flat[n_panels:]:
        unused.set_axis_off()
    return figure, axes.flat[:n_panels]


def save_figure(path, figure):
    from matplotlib import pyplot
    disk.write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)
