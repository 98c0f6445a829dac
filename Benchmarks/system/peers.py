"""vnetr and its peers, on the same work."""

import forwarders
import measures
from results import measure, number

NAME = "peers"
# What a smoke run measures.
SMOKE = ("native", "vxlan", "vnetr", "socat")
# Of so short a run as the smoke run.
MAY_BE_MISSING = ("udp_lossless_gbps",)
TITLE = "vnetr and its peers"
MEASURES = [
    measure("rtt_avg_us", "RTT average", "µs", 1, "lower"),
    measure("rtt_p50_us", "RTT median", "µs", 0, "lower"),
    measure("rtt_p99_us", "RTT 99th percentile", "µs", 0, "lower"),
    measure("tcp_gbps", "TCP, 1 flow", "Gb/s"),
    measure("tcp_cpu_seconds_per_gb", "CPU, TCP 1 flow", "s/GB", 2, "lower"),
    measure("tcp4_gbps", "TCP, 4 flows", "Gb/s"),
    measure("tcp_window_gbps", "TCP, 64 KB windows", "Gb/s"),
    measure("udp_gbps", "UDP 1400 B delivered", "Gb/s"),
    measure("udp_lossless_gbps", "UDP 1400 B, at most 0.5 % lost", "Gb/s"),
    measure("udp_small_fps", "UDP 64 B delivered", "frames/s", 0),
    measure("shaped_share", "TCP in 1 Gb/s, share of goodput", "", 3),
]
HOW = [
    "Two hosts and a guest on each are network namespaces of this machine. Guests' MTU 1500; underlay's 1600.",
    "Each round sets up, measures and takes down every peer once, in turn.",
    "TCP and UDP by iperf3; the figures are the receiver's.",
    "RTT: `ping -i 0`, a flood that prints each reply's time, in whole microseconds.",
    "CPU: seconds that the whole machine was busy for each GB of TCP payload, traffic tool and all.",
    "UDP 1400 B delivered: payload, sender unthrottled.",
    "UDP 1400 B, at most 0.5 % lost: the highest rate offered, by bisection in runs of 1 s with socket buffers of 4 MiB"
    " (with iperf3's default of 208 KiB a receiver that waits for a CPU loses at any rate). A rate counts where one of"
    " two runs lost no more.",
    "UDP 64 B: payload of 18 B, so that frames are 64 B with their frame check sequence; sender unthrottled.",
    "TCP in 1 Gb/s: the underlay shaped by TBF; goodput is what full segments' headers leave of it.",
]
REFERENCES = ("native", "vxlan", "vnetr")


def work(effort):
    def measured(forwarder, lab, turn):
        turn.take(("rtt_avg_us", "rtt_p50_us", "rtt_p99_us"), measures.round_trip, lab, effort)
        turn.take(("tcp_gbps", "tcp_cpu_seconds_per_gb"), measures.tcp, lab, effort)
        turn.take(("tcp4_gbps",), lambda: measures.tcp(lab, effort, flows=4)[0])
        turn.take(("tcp_window_gbps",), lambda: measures.tcp(lab, effort, window="64K")[0])
        turn.take(("udp_gbps", "udp_lossless_gbps"), udp, lab, effort)
        turn.take(("udp_small_fps",), lambda: measures.udp(
            lab, effort, measures.PAYLOAD_BYTES_OF_64_BYTE_FRAME)["datagrams_per_second"])
        if forwarder.added_bytes is not None:
            turn.take(("shaped_share",), measures.shaped_share, lab, effort, forwarder)
    return measured


def udp(lab, effort):
    unthrottled = measures.udp(lab, effort, measures.UDP_PAYLOAD_BYTES)
    lossless = measures.udp_lossless(lab, effort)
    return unthrottled["delivered"] / 1e9, lossless / 1e9 if lossless else None


# The work, the measure's key, what it is compared with, the ratio to reach and the better one; `lower` where the
# ratio is not to be above it.
TARGETS = [
    ("TCP, one flow", "tcp_gbps", "vxlan", 0.9, 1.0),
    ("TCP, one flow", "tcp_gbps", "best", 10, None),
    ("TCP, 64 KB windows", "tcp_window_gbps", "vxlan", 0.4, 0.6),
    ("UDP 1400 B delivered, sender unthrottled", "udp_gbps", "vxlan", 1.5, 2),
    ("UDP 1400 B, highest rate with at most 0.5 % loss", "udp_lossless_gbps", "vxlan", 1.3, 1.8),
    ("UDP 64 B delivered", "udp_small_fps", "vxlan", 1.0, 2),
    ("flood ping, average RTT", "rtt_avg_us", "vxlan", 2.5, 1.5),
    ("flood ping, average RTT", "rtt_avg_us", "best", 0.4, None),
    ("TCP in 1 Gb/s, share of the goodput", "shaped_share", None, 0.97, 0.99),
]


def best_user_space(result, column):
    """The best peer in user space: of layer 2, or of any for round trips."""
    groups = [forwarders.USER_SPACE_LAYER_2]
    if column["better"] == "lower":
        groups.append(forwarders.USER_SPACE_LAYER_3)
    medians = {subject["key"]: result.median(subject["key"], column["key"])
               for subject in result.subjects if subject["group"] in groups}
    medians = {key: value for key, value in medians.items() if value is not None}
    if not medians:
        return None
    return (min if column["better"] == "lower" else max)(medians, key=medians.get)


def targets_table(result):
    rows = []
    columns = {column["key"]: column for column in result.measures}
    for work_title, key, against, least, better in TARGETS:
        column = columns[key]
        lower = column["better"] == "lower"
        if against is None:
            title, value = "goodput that headers leave", result.median("vnetr", key)
        else:
            reference = best_user_space(result, column) if against == "best" else against
            value = result.ratio("vnetr", reference, key) if reference else None
            title = "best in user space" if against == "best" else result_title(result, reference)
            if against == "best" and reference:
                title += f" ({result.title(reference)})"

        def reached(bound):
            return value <= bound if lower else value >= bound

        if value is None:
            verdict = "not measured"
        elif better is not None and reached(better):
            verdict = "better reached"
        else:
            verdict = "reached" if reached(least) else "NOT reached"
        sign = "≤ " if lower else "≥ "
        rows.append([work_title, title, sign + f"{least:g} ×", sign + f"{better:g} ×" if better is not None else "",
                     number(value, 2 if value is None or value >= 0.1 else 3), verdict])
    return {"title": "Targets for vnetr", "columns": ["work", "against", "at least", "better", "here", "verdict"],
            "rows": rows}


def result_title(result, key):
    return next((subject["title"] for subject in result.subjects if subject["key"] == key), key)


def subjects():
    return forwarders.ALL


def tables(result):
    return [targets_table(result)] if any(subject["key"] == "vnetr" for subject in result.subjects) else []


def plot(result):
    import plots
    return plots.bars(result, lambda subject: subject["group"] == forwarders.OURS)
