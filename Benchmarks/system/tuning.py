"""Every tuning flag, one at a time, on the same work."""

import pathlib

import forwarders
import measures
from lab import Failure, Unavailable
from results import measure, number

NAME = "tuning"
TITLE = "Tuning flags, one at a time"
MAY_BE_MISSING = ()
REFERENCE = pathlib.Path("docs/configuration.md")
DEFAULTS = "defaults"
REFERENCES = (DEFAULTS,)

PIPELINE = ("--layout", "pipeline")
# By key of [tuning]: the values beside the default. A tuple is a value and the other flags that it has a meaning with.
SWEEPS = {
    "layout": ["fused", "pipeline"],
    "cpus": ["0", "1", "0,1", ("rx=0 route=0 tx=1", PIPELINE), ("rx=0 route=1 tx=1", PIPELINE)],
    "dispatch": ["guest-driven", "vmm-driven"],
    "dispatch_upper_fps": [1_000, 3_000, 30_000, 100_000],
    "dispatch_lower_fps": [0, 100, 10_000],
    "dispatch_period_ms": [1, 100],
    "yield": ["immediate", "timed"],
    "spin_us": [0, 20, 100, 200, 1_000],
    "io": ["uring", "syscalls"],
    "ring_entries": [64, 1_024, 4_096],
    # At most half of the slots: more would be measured as 128.
    "batch_frames": [1, 8, 16, 32, 128],
    "batch_wait_us": [10, 50, 200],
    "slots": [128, 1_024, 4_096, (128, PIPELINE), (1_024, PIPELINE)],
    "ring_depth_frames": [(depth, PIPELINE) for depth in (128, 4_096)],
    "ring_batch_frames": [(batch, PIPELINE) for batch in (1, 16, 256)],
    "send_buffer_bytes": [65_536, 212_992, 1_048_576],
    "receive_buffer_bytes": [65_536, 212_992, 1_048_576],
    "source_ports": [1, 2, 64],
    "gso": ["false"],
    "gro": ["false"],
    "huge_pages": ["on", "off"],
    "without": ["single-issuer", "deferred-work", "buffer-ring", "multishot-receive", "multishot-read", "fixed-files",
                "restrictions"],
}
RTT, TCP, UDP = "rtt_avg_us", "tcp_gbps", "udp_gbps"
MEASURES = [
    measure(RTT, "RTT average", "µs", 1, "lower"),
    measure(TCP, "TCP, 1 flow", "Gb/s"),
    measure("tcp_cpu_seconds_per_gb", "CPU, TCP 1 flow", "s/GB", 2, "lower"),
    measure(UDP, "UDP 1400 B delivered", "Gb/s"),
]
HOW = [
    "Two hosts and a guest on each are network namespaces of this machine; VXLAN over TAP, guests' MTU 1500, underlay's"
    " 1600; both hosts' vnetr have default settings but the one flag.",
    "Each round sets up, measures and takes down every setting once, in turn; the defaults are one of them.",
    "RTT: `ping -i 0`, a flood. TCP and UDP by iperf3, senders unthrottled; the figures are the receiver's.",
    "CPU: seconds that the whole machine was busy for each GB of TCP payload, traffic tool and all.",
]


class Setting(forwarders.VnetrForwarder):
    def __init__(self, key, name, value, flags):
        self.name, self.value, self.part, self.is_always = name, value, name, not name
        super().__init__(key, f"{name} = {value}" if name else DEFAULTS, flags=flags)

    def facts(self):
        return {"name": self.name, "value": self.value}


def documented():
    """The keys of [tuning] and their defaults, as the configuration's reference has them."""
    defaults = {}
    _, _, section = REFERENCE.read_text().partition("\n## `[tuning]`\n")
    for line in section.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if line.startswith("| `") and len(cells) == 5:
            defaults[cells[0].strip("|` ")] = cells[3].strip('`"')
    return defaults


def subjects():
    found = [Setting(DEFAULTS, "", "", ())]
    for name, values in SWEEPS.items():
        for value in values:
            value, others = value if isinstance(value, tuple) else (value, ())
            flag = "--" + name.replace("_", "-")
            found.append(Setting(f"{name}={value}".replace(" ", "+").replace(",", "+"), name, value,
                                 (flag, value, *others)))
    return found


SMOKE = (DEFAULTS, "batch_frames", "gso", "gro")


def prepare(setting, lab):
    try:
        forwarders.set_up(setting, lab)
    except Failure as failure:
        # A setting that this machine cannot have is no error: huge pages, say.
        raise Unavailable(str(failure)) from None


def work(effort):
    def measured(_setting, lab, turn):
        turn.take((RTT,), lambda: measures.round_trip(lab, effort)[RTT])
        turn.take((TCP, "tcp_cpu_seconds_per_gb"), measures.tcp, lab, effort)
        turn.take((UDP,), lambda: measures.udp(lab, effort, measures.UDP_PAYLOAD_BYTES)["delivered"] / 1e9)
    return measured


def flags_table(result):
    """For each flag its default and the other values."""
    rows = []
    for name, default in documented().items():
        of = [subject for subject in result.subjects if subject["name"] == name]
        if not of:
            continue
        for key, title in [(DEFAULTS, f"{default} (default)"), *((each["key"], str(each["value"])) for each in of)]:
            row = [name, title + (", with layout = pipeline" if needs_pipeline(key) else "")]
            for column in result.measures:
                row.append(number(result.median(key, column["key"]), column["digits"]))
                row.append(number(result.ratio(key, DEFAULTS, column["key"]), 2))
            rows.append(row)
    columns = [cell for column in result.measures for cell in (f"{column['title']}, {column['unit']}", "÷ default")]
    return {"title": "By flag", "columns": ["flag", "value", *columns], "rows": rows}


def needs_pipeline(key):
    return any(setting.key == key and PIPELINE == tuple(setting.flags[2:]) for setting in subjects())


def tables(result):
    defaults = documented()
    for name in [*defaults, *SWEEPS]:
        if (name in defaults) != (name in SWEEPS):
            why = "tuning.py has no values for it" if name in defaults else "there is no such key"
            result.fail(f"[tuning] {name}: {why}")
    return [flags_table(result)]


def plot(result):
    import plots
    return plots.bars(result, lambda subject: subject["key"] == DEFAULTS, columns=2)
