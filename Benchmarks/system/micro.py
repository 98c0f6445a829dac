"""Results of the microbenchmarks, of the figures that the Swift program writes: micro.py FIGURES.json FOLDER."""

import json
import pathlib
import statistics
import sys

from results import Result, measure, number, wrapped

NAME = "micro"
TITLE = "Microbenchmarks"
MEASURES = [measure("ns", "time an item", "ns", 2, "lower"), measure("allocations", "allocations", "", 0, "lower")]
HOW = [
    "One process, in memory. The rows of a table take turns; each has one run to warm up, which does not count.",
    "Speed: how many times as fast as the first row of the table, by medians.",
    "DPDK is Debian's package; its functions are compiled by GCC with the flags that its pkg-config file has.",
    "Allocations: calls of malloc and its kin in what was measured, of all runs of a row.",
]


# The start of a table's title, the row that is meant, the row that it is compared with (none: millions a second), the
# least that is wanted, and what would be better.
TARGETS = [
    ("SPSC ring of 1024 places, items of 8 bytes, batches of 32", "SPSCRing", "rte_ring", 1.0, 1.2),
    ("SPSC ring of 1024 places, items of 64 bytes, batches of 32", "SPSCRing", "rte_ring", 1.0, 1.2),
    ("route + encapsulate, in memory, one core, 1000000", "the same, prefetched some frames ahead", None, 20, 40),
]


def targets_table(groups):
    rows = []
    for title, name, reference, least, better in TARGETS:
        group = next((group for group in groups if group["title"].startswith(title)), None)
        medians = {row["name"]: statistics.median(row["ns"]) for row in group["rows"]} if group else {}
        if name not in medians or (reference and reference not in medians):
            continue
        value = medians[reference] / medians[name] if reference else 1000 / medians[name]
        unit = "×" if reference else "M/s"
        verdict = "better reached" if value >= better else "reached" if value >= least else "NOT reached"
        rows.append([f"{group['title']}: {name}", reference or "-", f"≥ {least:g} {unit}", f"≥ {better:g} {unit}",
                     number(value, 2), verdict])
    return {"title": "Targets", "columns": ["what", "against", "at least", "better", "here", "verdict"], "rows": rows,
            "notes": []}


class MicroResult(Result):
    def all_tables(self):
        """A table for each one that was measured, instead of one for all rows and one for each measure."""
        targets = self.document.get("targets")
        return ([targets] if targets else []) + self.document["tables"]


def table(group, document):
    medians = [statistics.median(row["ns"]) for row in group["rows"]]
    rows = []
    for row, median in zip(group["rows"], medians):
        bits = f"{row['bytes'] * 8 / median:,.1f}" if row["bytes"] else "-"
        rows.append([
            row["name"], number(min(row["ns"]), 2), number(median, 2), number(max(row["ns"]), 2),
            number(1000 / median, 2), number(medians[0] / median, 2), bits, str(row["allocations"]),
        ])
    return {
        "title": group["title"], "columns": [f"ns a {group['item']}", "min", "median", "max", "M/s", "speed", "Gb/s",
                                             "allocations"], "rows": rows, "notes": group["notes"],
    }


def result(figures):
    groups = figures["tables"]
    subjects = [
        {"key": f"{place}.{number}", "title": f"{group['title']}: {row['name']}"}
        for place, group in enumerate(groups) for number, row in enumerate(group["rows"])
    ]
    skipped = [{"key": f"skipped.{place}", "title": each["what"]} for place, each in enumerate(figures["skipped"])]
    made = MicroResult(Result.new(
        NAME, TITLE, MEASURES, subjects + skipped, {"repetitions": figures["repetitions"]}, HOW).document)
    made.document["versions"] = {
        name: version for name, version in figures["versions"].items() if name in ("compiler", "DPDK")}
    made.document["failures"] = figures["failures"]
    for place, group in enumerate(groups):
        for count, row in enumerate(group["rows"]):
            for time in row["ns"]:
                made.add(f"{place}.{count}", {"ns": time})
            made.add(f"{place}.{count}", {"allocations": row["allocations"]})
    for subject, each in zip(skipped, figures["skipped"]):
        made.skip(subject["key"], each["reason"])
    targets = targets_table(groups)
    made.document["tables"] = [table(group, made.document) for group in groups]
    if targets["rows"]:
        made.document["targets"] = targets
    return made


def plot(made):
    """A panel for each table, a bar with the median for each row, and a line from min to max."""
    import plots
    tables = made.document["tables"]
    columns = 3
    rows_max = max(len(each["rows"]) for each in tables)
    figure, axes = plots.grid(len(tables), columns, 5.2, 0.2 * rows_max + 0.8)
    for place, (axis, each) in enumerate(zip(axes, tables)):
        names = [row[0] for row in each["rows"]]
        for line, name in enumerate(names):
            low, median, high = made.three(f"{place}.{line}", "ns")
            is_ours = not name.startswith("rte_")
            axis.barh(line, median, color=plots.OURS_COLOUR if is_ours else plots.OTHERS_COLOUR, height=0.7)
            axis.plot([low, high], [line, line], color="black", linewidth=0.8)
            axis.annotate(f" {median:,.2f}", (max(median, high), line), va="center", fontsize=6)
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_title("\n".join(wrapped(f"{each['title']}, {each['columns'][0]}", 60)), fontsize=7, loc="left")
    figure.tight_layout()
    return figure


def main():
    figures, folder = sys.argv[1:]
    with open(figures, encoding="utf-8") as file:
        made = result(json.load(file))
    why_no_plot = made.write(pathlib.Path(folder), plot)
    if why_no_plot:
        print(f"bench: {why_no_plot}", file=sys.stderr)
    print(f"bench: written to {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
