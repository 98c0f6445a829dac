"""The result of a benchmark: a document for JSON, and the tables and plots that are made of it and nothing else."""

import json
import os
import platform
import statistics
import subprocess
import time

from lab import BusyClock


def machine():
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith(("model name", "Model")):
                model = line.split(":", 1)[1].strip()
                break
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = int(file.readline().split()[1]) * 1024
    clock = BusyClock()
    time.sleep(0.5)
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": model,
        "cores": cores,
        "kernel": f"{platform.system()} {platform.release()}",
        "memory_bytes": memory,
        # What else ran: figures are worth little where this is much.
        "busy_percent_before": round(100 * clock.seconds() / 0.5 / cores, 1),
    }


def revision():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def today():
    # For builds that shall be the same each time.
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def measure(key, title, unit, digits=2, better="higher"):
    """A column: `better` is higher or lower."""
    return {"key": key, "title": title, "unit": unit, "digits": digits, "better": better}


class Result:
    """Wraps the document.

    measures: columns as `measure` makes them; subjects: rows, each with key and title, and what else a benchmark wants;
    values: by subject's and measure's key one figure of each round, null where there is none; skipped: by subject's
    key, why it did not run; failures: what went wrong, in words; tables: more tables, each with title, columns, rows,
    and perhaps notes: lines below it.
    """

    def __init__(self, document):
        self.document = document

    @classmethod
    def new(cls, name, title, measures, subjects, options, how, references=()):
        return cls({
            "benchmark": name, "title": title, "date": today(), "revision": revision(), "machine": machine(),
            "versions": {}, "options": options, "how": how, "references": list(references), "measures": measures,
            "subjects": subjects, "values": {subject["key"]: {} for subject in subjects}, "skipped": {}, "failures": [],
            "turns": {"all": 0, "disturbed": 0, "programs_share_max": 0.0, "machines_share_max": 0.0},
            "tables": [],
        })

    @classmethod
    def load(cls, path):
        with open(path, encoding="utf-8") as file:
            return cls(json.load(file))

    # --- Filling ---

    def add(self, subject, figures):
        for key, value in figures.items():
            self.document["values"][subject].setdefault(key, []).append(value)

    def skip(self, subject, reason):
        self.document["skipped"][subject] = reason

    def fail(self, what):
        self.document["failures"].append(what)

    def count_turn(self, turn):
        """Notes how far others disturbed a turn of rounds.py."""
        turns = self.document["turns"]
        turns["all"] += 1
        turns["disturbed"] += turn.is_disturbed
        for key, share in (("programs_share_max", turn.programs), ("machines_share_max", turn.machines)):
            turns[key] = round(max(turns[key], share), 3)

    def summarize(self):
        """What readers of the JSON would work out themselves."""
        self.document["summary"] = {
            subject["key"]: {
                column["key"]: dict(zip(("min", "median", "max"), three))
                for column in self.measures if (three := self.three(subject["key"], column["key"]))
            } for subject in self.subjects
        }

    # --- Reading ---

    @property
    def measures(self):
        return self.document["measures"]

    @property
    def subjects(self):
        return self.document["subjects"]

    def title(self, subject):
        return next(each["title"] for each in self.subjects if each["key"] == subject)

    def figures(self, subject, key):
        return [value for value in self.document["values"].get(subject, {}).get(key, []) if value is not None]

    def median(self, subject, key):
        values = self.figures(subject, key)
        return statistics.median(values) if values else None

    def three(self, subject, key):
        values = self.figures(subject, key)
        return (min(values), statistics.median(values), max(values)) if values else None

    def ratio(self, subject, reference, key):
        mine, theirs = self.median(subject, key), self.median(reference, key)
        return mine / theirs if mine is not None and theirs else None

    def measured_subjects(self):
        return [subject for subject in self.subjects if any(
            self.figures(subject["key"], column["key"]) for column in self.measures)]

    # --- Tables ---

    def medians_table(self):
        """Subjects as rows where there are many of them, else as columns."""
        subjects = self.measured_subjects()

        def cell(subject, column):
            return number(self.median(subject["key"], column["key"]), column["digits"])

        if len(subjects) > 12:
            headings = ["", *map(label, self.measures)]
            rows = [[subject["title"], *(cell(subject, column) for column in self.measures)] for subject in subjects]
        else:
            headings = ["", *(subject["title"] for subject in subjects)]
            rows = [[label(column), *(cell(subject, column) for subject in subjects)] for column in self.measures]
        return {"title": "Medians", "columns": headings, "rows": rows}

    def detail_tables(self):
        """For each measure min, median, max, and ratios to the references (subjects' keys)."""
        references = [key for key in self.document["references"] if self.document["values"].get(key)]
        for column in self.measures:
            key, digits = column["key"], column["digits"]
            rows = []
            for subject in self.measured_subjects():
                three = self.three(subject["key"], key)
                if three is None:
                    continue
                ratios = [number(self.ratio(subject["key"], reference, key), 2) for reference in references]
                rows.append([subject["title"], *(number(value, digits) for value in three), *ratios])
            if rows:
                yield {
                    "title": f"{label(column)} ({column['better']} is better)",
                    "columns": ["", "min", "median", "max", *("÷ " + self.title(key) for key in references)],
                    "rows": rows,
                }

    def all_tables(self):
        return [self.medians_table(), *self.document["tables"], *self.detail_tables()]

    def conditions(self):
        """What it was measured on and how, in lines."""
        document, host = self.document, self.document["machine"]
        yield f"{host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB, {host['kernel']}"
        busy = host["busy_percent_before"]
        yield f"{document['date']}, revision {document['revision']}; the machine was {busy} % busy before"
        yield "options: " + ", ".join(f"{key} {value}" for key, value in document["options"].items())
        yield "versions: " + "; ".join(f"{key} {value}" for key, value in document["versions"].items())
        yield from document["how"]
        turns = document["turns"]
        if turns["disturbed"]:
            yield f"DISTURBED: in {turns['disturbed']} of {turns['all']} turns others took CPU time: programs up to" \
                  f" {turns['programs_share_max']:.0%}, other virtual machines up to" \
                  f" {turns['machines_share_max']:.0%} of a CPU"

    def remarks(self):
        for subject, reason in self.document["skipped"].items():
            yield f"skipped: {self.title(subject)}: {reason}"
        for failure in self.document["failures"]:
            yield f"failed: {failure}"

    def text(self):
        parts = ["\n".join(self.conditions())]
        parts += ["\n".join([table["title"], aligned(table), *table.get("notes", [])]) for table in self.all_tables()]
        parts.append("\n".join(self.remarks()))
        return "\n\n".join(part for part in parts if part)

    def markdown(self):
        document = self.document
        lines = [f"# {document['title']}", "", f"Made by `tools/bench {document['benchmark']}`: do not edit.", ""]
        lines += [f"- {line}" for line in self.conditions()]
        lines += ["", f"![{document['title']}]({document['benchmark']}.svg)"]
        for table in self.all_tables():
            lines += ["", f"## {table['title']}", "", *piped(table)]
            if table.get("notes"):
                # What is indented belongs to the line before it.
                lines += ["", *(f"{note[:len(note) - len(note.lstrip())]}- {note.lstrip()}" for note in table["notes"])]
        remarks = list(self.remarks())
        if remarks:
            lines += ["", "## Not measured", "", *(f"- {line}" for line in remarks)]
        return "\n".join(lines) + "\n"

    def write(self, folder, plot):
        """NAME.json, NAME.md and, by `plot`, NAME.svg; returns what could not be written and why."""
        self.summarize()
        folder.mkdir(parents=True, exist_ok=True)
        name = self.document["benchmark"]
        (folder / f"{name}.json").write_text(json.dumps(self.document, indent=1, ensure_ascii=False) + "\n")
        (folder / f"{name}.md").write_text(self.markdown())
        try:
            import plots
        except ImportError as error:
            return f"{name}.svg is not written: {error}: Debian package python3-matplotlib"
        plots.save(plot(self), folder / f"{name}.svg")
        return None


def label(column):
    return column["title"] + (f", {column['unit']}" if column["unit"] else "")


def number(value, digits):
    if value is None:
        return "-"
    return f"{value:,.{digits}f}"


HEADING_CHARACTERS_MAX = 14


def aligned(table):
    """A table as text: the first column flush left, the others right; long headings are broken."""
    columns = list(zip(table["columns"], *table["rows"]))
    widths = [max(min(len(heading), HEADING_CHARACTERS_MAX), *(len(cell) for cell in cells), 1)
              for heading, *cells in columns]
    headings = [wrapped(heading, width) for heading, width in zip(table["columns"], widths)]
    height = max(len(heading) for heading in headings)
    lines = [[([""] * (height - len(heading)) + heading)[line] for heading in headings] for line in range(height)]
    return "\n".join(
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width)
                  for index, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in lines + table["rows"])


def wrapped(text, width):
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def piped(table):
    yield "| " + " | ".join(table["columns"]) + " |"
    yield "|" + "---|" + "---:|" * (len(table["columns"]) - 1)
    for row in table["rows"]:
        yield "| " + " | ".join(row) + " |"
