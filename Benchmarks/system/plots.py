"""Plots of results, as SVG: the same document gives the same file."""

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({
    "svg.hashsalt": "vnetr", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8,
    "axes.spines.top": False, "axes.spines.right": False,
})

import matplotlib.pyplot as pyplot  # noqa: E402

from results import label  # noqa: E402

OURS_COLOUR, OTHERS_COLOUR = "#c2410c", "#94a3b8"
# Bars whose lengths differ by more than this factor are drawn on a logarithmic scale.
LOGARITHMIC_FROM = 20


def save(figure, path):
    figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def grid(count, columns, width, height):
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    flat = [axis for row in axes for axis in row]
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def bars(result, is_ours, columns=3):
    """A panel for each measure, a bar with the median for each subject, and a line from min to max."""
    subjects = result.measured_subjects()
    figure, axes = grid(len(result.measures), columns, 4.2, 0.22 * len(subjects) + 0.8)
    for axis, column in zip(axes, result.measures):
        shown = [(subject, result.three(subject["key"], column["key"])) for subject in subjects]
        shown = [(subject, three) for subject, three in shown if three]
        for place, (subject, (low, middle, high)) in enumerate(shown):
            axis.barh(place, middle, color=OURS_COLOUR if is_ours(subject) else OTHERS_COLOUR, height=0.7)
            axis.plot([low, high], [place, place], color="black", linewidth=0.8)
            axis.annotate(f" {middle:,.{column['digits']}f}", (max(middle, high), place), va="center", fontsize=7)
        axis.set_yticks(range(len(shown)), [subject["title"] for subject, _ in shown])
        axis.invert_yaxis()
        medians = [middle for _, (_, middle, _) in shown]
        if medians and min(medians) > 0 and max(medians) > LOGARITHMIC_FROM * min(medians):
            axis.set_xscale("log")
        axis.margins(x=0.2)
        axis.set_title(label(column), fontsize=8, loc="left")
        axis.set_xlabel(f"{column['better']} is better", fontsize=7, loc="left")
    figure.tight_layout()
    return figure


def growth(result, name, count, **panel):
    """Panels for `lines`: for each measure a series for each name, over counts; `name` and `count` are functions of a
    subject."""
    panels = []
    for column in result.measures:
        series = {}
        for subject in result.measured_subjects():
            three = result.three(subject["key"], column["key"])
            if three:
                series.setdefault(name(subject), []).append((count(subject), three))
        if series:
            panels.append({"title": label(column), "series": series, **panel})
    return panels


def lines(panels, columns=3):
    """Each panel: title, label of x, whether x is logarithmic, and series by name: (x, (min, median, max)) points."""
    figure, axes = grid(len(panels), columns, 4.2, 2.6)
    for axis, panel in zip(axes, panels):
        for name, points in panel["series"].items():
            x = [point[0] for point in points]
            axis.plot(x, [point[1][1] for point in points], marker="o", markersize=3, label=name)
            axis.fill_between(x, [point[1][0] for point in points], [point[1][2] for point in points], alpha=0.2)
        if panel.get("logarithmic", True):
            axis.set_xscale("log", base=panel.get("base", 10))
        axis.set_ylim(bottom=0)
        axis.set_xlabel(panel["x"])
        axis.set_title(panel["title"], fontsize=8, loc="left")
        if len(panel["series"]) > 1:
            axis.legend(fontsize=6)
    figure.tight_layout()
    return figure
