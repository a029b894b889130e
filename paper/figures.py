"""Figures with matplotlib: panels side by side, error bars over seeds, into a PNG."""
import numpy as np

import disk


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
        for label in axis.get_xticklabels():
            label.set(rotation=60, ha="right")


def draw_points(axis, curves):
    """A point for every seed: seeds may lie on both sides of a mean, and none near it."""
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
    figure, axes = open_figure(len(panels), 5, len(panels))
    for axis, (title, curves) in zip(axes, panels.items()):
        draw(axis, curves)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    figure.tight_layout()
    save_figure(path, figure)


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
