"""The benchmarks of the whole system; tools/bench starts this."""

import argparse
import importlib
import os
import pathlib
import resource
import sys
import tempfile

import vnetr
from forwarders import first_line
from lab import Failure, Unavailable, interruption
from measures import Effort
from results import Result
from rounds import measured

BENCHMARKS = ("peers", "paper", "io", "trace", "tuning", "scale", "vhost")
# Python has modules of these names.
MODULES = {"io": "input_output", "trace": "ping_trace"}


def module(name):
    return importlib.import_module(MODULES.get(name, name))


class Options(argparse.Namespace):
    """What a benchmark is told."""

    def shown(self):
        shown = {"rounds": self.rounds, "seconds": self.seconds}
        if self.only:
            shown["only"] = " ".join(self.only)
        return shown


def number(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("wants a number from 1")
    return value


def parsed():
    parser = argparse.ArgumentParser(prog="tools/bench", allow_abbrev=False)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--rounds", type=number, default=5)
    parser.add_argument("--seconds", type=number, default=3)
    parser.add_argument("--only", "--peers", type=lambda text: text.split(","), default=[])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args(namespace=Options())
    if options.smoke:
        options.rounds, options.seconds = 1, 1
        options.only = options.only or list(module(options.name).SMOKE)
    known = {name for each in module(options.name).subjects() for name in (each.part, each.key) if name}
    for key in options.only:
        if key not in known:
            parser.error(f"'{key}' is none of {', '.join(sorted(known))}")
    return options


def show(result):
    tables = result.text()
    print(tables, flush=True)


def smoke_checks(result, benchmark, folder):
    """Whether figures came out and the files are well-formed: (how many checks, what is wrong)."""
    wrong = list(result.document["failures"])
    checks = 0
    for subject in result.subjects:
        if subject["key"] in result.document["skipped"]:
            continue
        for key, values in result.document["values"][subject["key"]].items():
            checks += 1
            # Of so short a run a rate without loss may not be found.
            if key not in benchmark.MAY_BE_MISSING and not all(value is not None and value >= 0 for value in values):
                wrong.append(f"{subject['title']}: {key} is {values}")
        if not result.document["values"][subject["key"]]:
            wrong.append(f"{subject['title']}: no figures")
    why_no_plot = result.write(folder, benchmark.plot)
    again = Result.load(folder / f"{benchmark.NAME}.json")
    markdown = (folder / f"{benchmark.NAME}.md").read_text()
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    checks += 2
    if again.document != result.document:
        wrong.append("the JSON does not say what was measured")
    if not widths or not markdown.startswith("# "):
        wrong.append("the tables are malformed")
    if why_no_plot:
        print(f"bench: {why_no_plot}", file=sys.stderr)
    else:
        checks += 1
        from xml.etree import ElementTree
        if not ElementTree.parse(folder / f"{benchmark.NAME}.svg").getroot().tag.endswith("svg"):
            wrong.append("the plot is no SVG")
    return checks, wrong


def main():
    options = parsed()
    benchmark = module(options.name)
    if options.again:
        result = Result.load(options.output / f"{options.name}.json")
        show(result)
        return finish(result, options, benchmark)
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        print("bench: needs root and /dev/net/tun: it makes network namespaces and TAP devices", file=sys.stderr)
        return 1
    vnetr.binary = os.environ["VNETR"]
    interruption.install()
    # Of many links each has several sockets.
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
    try:
        result = measured(benchmark, options, Effort(options.seconds, options.smoke))
    except Unavailable as reason:
        # All of it.
        print(f"bench{': skipped' if options.smoke else ''}: {options.name}: {reason}", file=sys.stderr)
        return 0 if options.smoke else 1
    except Failure as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    result.document["versions"].update({
        "vnetr": first_line(vnetr.binary, "--version"), "iperf3": first_line("iperf3", "--version"),
        "ping": first_line("ping", "-V"),
    })
    if options.smoke:
        with tempfile.TemporaryDirectory(prefix="vnetr-bench-") as folder:
            checks, wrong = smoke_checks(result, benchmark, pathlib.Path(folder))
        for what in wrong:
            print(f"bench: {what}", file=sys.stderr)
        print(f"bench: {len(wrong)} of {checks} checks failed" if wrong else f"bench smoke: {checks} checks passed")
        return 1 if wrong or not checks else 0
    show(result)
    return finish(result, options, benchmark)


def finish(result, options, benchmark):
    why_no_plot = result.write(options.output, benchmark.plot)
    if why_no_plot:
        print(f"bench: {why_no_plot}", file=sys.stderr)
    print(f"bench: written to {options.output}", file=sys.stderr)
    return 1 if result.document["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
