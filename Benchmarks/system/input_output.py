"""What batched queues are worth: one system call a packet, batches of system calls, and io_uring."""

import forwarders
import measures
from results import measure, number

NAME = "io"
TITLE = "A system call a packet, batches of them, and io_uring"
MAY_BE_MISSING = ()

WORKS = [
    ("tcp", "TCP, 1 flow", "Gb/s"),
    ("udp", "UDP 1400 B delivered", "Gb/s"),
    ("small", "UDP 64 B delivered", "frames/s"),
]
KINDS = {"syscalls": ("system calls", (1, 8, 64, 256)), "uring": ("io_uring", (1, 2, 4, 8, 16, 32, 64, 128, 256))}
MEASURES = [
    column for key, title, unit in WORKS for column in (
        measure(key, title, unit, 0 if key == "small" else 2),
        measure(key + "_cpu_ns", title.removesuffix(" delivered") + ": CPU a frame", "ns", 0, "lower"),
        measure(key + "_enters", title.removesuffix(" delivered") + ": calls a frame on the wire", "", 3, "lower"),
        measure(key + "_receive_enters", title.removesuffix(" delivered") + ": calls a frame, trains as one", "", 3,
                "lower"),
    )
]
HOW = [
    "Two hosts and a guest on each are network namespaces of this machine; VXLAN over TAP, guests' MTU 1500, underlay's"
    " 1600; default settings but `--io`, `--batch-frames` and, for batches above 128, `--slots`: a batch is at most"
    " half of them.",
    "One system call a packet: `--io syscalls --batch-frames 1`. Batches of system calls: recvmmsg and sendmmsg.",
    "A batch is what one turn may bring. One recvmmsg, one sendmmsg and one chain of sends have at most 64 messages.",
    "Each round sets up, measures and takes down every way once, in turn. TCP and UDP by iperf3, senders unthrottled.",
    "CPU a frame: CPU time of both forwarders' threads by the frames that came in at both.",
    "Calls a frame on the wire: calls into the kernel of both (the forwarders' counter `enters`) by the same frames.",
    "Calls a frame, trains as one: by frames received, where a super-frame of a port and a train of a link count as one"
    " (the counter `receives`).",
]
# io_uring's defaults, and what they are to reach at load: calls a frame, trains as one.
DEFAULTS = "uring-64"
REFERENCES = ("syscalls-1", DEFAULTS)
ENTERS_MAX, ENTERS_BETTER = 0.05, 0.02
# The default.
SLOTS = 256


class Way(forwarders.VnetrForwarder):
    def __init__(self, kind, batch):
        self.kind, self.batch = kind, batch
        title = KINDS[kind][0] + (", one a packet" if kind == "syscalls" and batch == 1 else f", batches of {batch}")
        flags = ("--io", kind, "--batch-frames", batch, "--slots", max(SLOTS, 2 * batch))
        super().__init__(f"{kind}-{batch}", title, flags=flags)

    def facts(self):
        return {"kind": self.kind, "batch": self.batch}


def subjects():
    return [Way(kind, batch) for kind, (_, batches) in KINDS.items() for batch in batches]


SMOKE = ("syscalls-1", "syscalls-64", "uring-64")


def total(way):
    works = [process.work() for process in way.running.values()]
    return {key: sum(work[key] for work in works) for key in works[0]}


def counted(way, run):
    """The figure that `run` returns, and what the forwarders spent on it."""
    before = total(way)
    figure = run()
    spent = {key: value - before[key] for key, value in total(way).items()}
    return (figure, spent["cpu_seconds"] * 1e9 / spent["frames"], spent["enters"] / spent["frames"],
            spent["enters"] / spent["receives"])


def work(effort):
    runs = {
        "tcp": lambda lab: measures.tcp(lab, effort)[0],
        "udp": lambda lab: measures.udp(lab, effort, measures.UDP_PAYLOAD_BYTES)["delivered"] / 1e9,
        "small": lambda lab: measures.udp(lab, effort, measures.PAYLOAD_BYTES_OF_64_BYTE_FRAME)["datagrams_per_second"],
    }

    def measured(way, lab, turn):
        for key, run_work in runs.items():
            turn.take((key, key + "_cpu_ns", key + "_enters", key + "_receive_enters"), counted, way,
                      lambda: run_work(lab))
    return measured


def tables(result):
    rows = []
    for key, title, _ in WORKS:
        value = result.median(DEFAULTS, key + "_receive_enters")
        verdict = ("not measured" if value is None else "better reached" if value <= ENTERS_BETTER
                   else "reached" if value <= ENTERS_MAX else "NOT reached")
        rows.append([title, f"≤ {ENTERS_MAX}", f"≤ {ENTERS_BETTER}", number(value, 3), verdict])
    return [{"title": "Targets for vnetr: calls of `io_uring_enter` a frame, trains as one",
             "columns": ["work", "at least", "better", "here", "verdict"], "rows": rows}]


def plot(result):
    import plots
    return plots.lines(plots.growth(
        result, lambda way: KINDS[way["kind"]][0], lambda way: way["batch"], x="frames a batch", base=2))
