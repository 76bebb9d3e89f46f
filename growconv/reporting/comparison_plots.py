"""Figures over many runs: differences with their intervals, what the accuracy cost, and its course."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from growconv.reporting.comparison import Comparison, Group, fixed_curves, network
from growconv.reporting.records import RunRecord
from growconv.reporting.run_plots import course, zoom
from growconv.reporting.style import DASHES, INK, SOFT, log_ticks, method_style, shortened
from growconv.reporting.terminal import magnitude

Styles = dict[str, tuple[str, str]]
PANELS = 24
"""Groups with a panel of their own, the best first."""


def draw_differences(comparison: Comparison) -> Figure:
    """Forest plot: paired differences to the baseline in test accuracy and test loss, with 95 % intervals."""
    groups = comparison.groups
    figure = Figure(figsize=(9.6, 1.3 + 0.3 * len(groups)), layout="constrained")
    compared = {"test_accuracy": "test accuracy, points"}
    if any(not math.isnan(group.mean("test_loss")) for group in groups):
        compared["test_loss"] = comparison.loss_name
    axes = figure.subplots(1, len(compared), sharey=True, squeeze=False)[0]
    styles = group_styles(comparison)
    name = comparison.baseline.label
    for axis, (figure_name, title) in zip(axes, compared.items(), strict=True):
        axis.axvline(0, color=SOFT, linewidth=0.8, zorder=0)
        for row, group in enumerate(groups):
            colour, marker = styles[group.label]
            difference = comparison.difference(group, figure_name)
            middle, half = 0.0 if group is comparison.baseline else math.nan, math.nan
            if difference is not None:
                middle, half = difference.mean, difference.high - difference.mean
            ends = None if math.isnan(half) else half
            axis.errorbar(middle, row, xerr=ends, color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.2)
        axis.set(xlabel=f"{title}: difference to {shortened(name, 30)}")
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.grid(axis="y", visible=False)
    names = []
    for group in groups:
        share = comparison.flops_share(group)
        names.append(
            shortened(group.label, 40) + ("" if math.isnan(share) else f"  ({100 * share:.0f} % of the FLOPs)")
        )
    axes[0].set_yticks(range(len(groups)), names)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    return figure


def draw_costs(comparison: Comparison) -> Figure:
    """Test accuracy against final parameters, training FLOPs and seconds: mean and standard deviation of each group."""
    styles = group_styles(comparison)
    rows = math.ceil(len(comparison.groups) / 4)
    figure = Figure(figsize=(9.6, 3.4 + 0.2 * rows), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    costs = {"parameters": "final parameters", "train_flops": "training FLOPs", "seconds": "seconds"}
    for axis, (cost, name) in zip(axes, costs.items(), strict=True):
        for group in comparison.groups:
            label = f"{group.label} (n={len(group.runs)})"
            _draw_group(axis, group, (cost, "test_accuracy"), styles[group.label], label)
        axis.set(xlabel=name)
        log_ticks(axis, "x")
    axes[0].set(ylabel="test accuracy %")
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=min(4, len(comparison.groups)))
    return figure


def draw_courses(comparison: Comparison) -> Figure:
    """Best validation accuracy against training FLOPs so far: a panel a group, the baseline in each of them."""
    styles = group_styles(comparison)
    baseline = comparison.baseline
    panels = [group for group in comparison.groups if group is not baseline][:PANELS] or [baseline]
    drawn = {group.label: mean_course(group.runs) for group in (*panels, baseline)}
    known = {label: each for label, each in drawn.items() if each is not None}
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(9.6, 0.9 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, group in zip(axes.flat, panels, strict=False):
        for grid, mean, _ in known.values():
            axis.plot(grid, mean, color=SOFT, linewidth=0.3)
        for label, colour, dash in ((baseline.label, INK, DASHES[1]), (group.label, styles[group.label][0], DASHES[0])):
            if label in known:
                grid, mean, spread = known[label]
                axis.plot(grid, mean, color=colour, linestyle=dash, linewidth=1.4)
                axis.fill_between(grid, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(shortened(group.label, 30), fontsize=9)
        log_ticks(axis, "x")
    zoom(axes.flat[0], [mean for _, mean, _ in known.values()])
    figure.supxlabel("training FLOPs so far", fontsize=9)
    figure.supylabel("best validation accuracy % so far", fontsize=9)
    figure.text(0.99, 0.005, f"dashed: {shortened(baseline.label, 30)}; thin: all", fontsize=8, ha="right", color=SOFT)
    return figure


def draw_frontier(comparison: Comparison) -> Figure:
    """Test loss against training FLOPs: a line a fixed network, a point a growing group."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    fixed = comparison.fixed
    sizes = {network(group.runs[0].summary): group.mean("parameters") for group in fixed}
    curves = fixed_curves(fixed)
    for number, name in enumerate(sorted(curves, key=lambda name: sizes[name])):
        flops = sorted(curves[name])
        label = f"fixed, {magnitude(sizes[name])} parameters"
        losses = [curves[name][each] for each in flops]
        axes.plot(flops, losses, color=SOFT, linestyle=DASHES[number % len(DASHES)], marker=".", label=label)
    styles = group_styles(comparison)
    for group in (group for group in comparison.groups if group not in fixed):
        _draw_group(axes, group, ("train_flops", "test_loss"), styles[group.label], shortened(group.label, 40))
    axes.set(xlabel="training FLOPs", ylabel=comparison.loss_name)
    log_ticks(axes, "x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _draw_group(axis: Axes, group: Group, keys: tuple[str, str], style: tuple[str, str], label: str) -> None:
    """The means of two figures of a group as a point, with their standard deviations."""
    right, up = (0.0 if math.isnan(value := group.std(key)) else value for key in keys)
    (x, y), (colour, marker) = map(group.mean, keys), style
    axis.errorbar(x, y, xerr=right, yerr=up, color=colour, marker=marker, linestyle="", linewidth=0.9, label=label)


def group_styles(comparison: Comparison) -> Styles:
    """Colour and marker of every group; of several groups of one method the shortest label has the method's own."""
    known: Styles = {}
    styles: Styles = {}
    for group in sorted(comparison.groups, key=lambda group: (len(group.label), group.label)):
        style = method_style(group.runs[0].method, group.label, known)
        taken = style in styles.values()
        styles[group.label] = method_style(group.label, "", known) if taken else style
    return styles


def mean_course(runs: Sequence[RunRecord]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """FLOPs, and mean and standard deviation over runs of the best validation accuracy so far.

    None where the runs have no range of FLOPs in common.
    """
    courses = [course(run, "train_flops") for run in runs]
    courses = [each for each in courses if each[0].size]
    if not courses:
        return None
    low, high = max(each[0][0] for each in courses), min(each[0][-1] for each in courses)
    if not high > low > 0:
        return None
    grid = np.geomspace(low, high, 200)
    values = np.array([np.interp(grid, *each) for each in courses])
    return grid, values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(grid))
