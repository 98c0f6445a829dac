"""The VNET/P paper's measurements: its four modes by ping and ttcp, free and in an underlay of 1 Gb/s."""

import forwarders
import measures
import vnetr
from results import measure, number

NAME = "paper"
TITLE = "The four modes of the VNET/P paper"
MAY_BE_MISSING = ()

# Xia, Cui, Lange, Tang, Dinda, Bridges: two hosts, 1 Gb/s Ethernet, a core each for host and guest. Figure 4 has round
# trips by ping, in milliseconds. Figure 5 has throughput by ttcp as bars; the text says that they fall in the order of
# the modes and differ little.
PAPER_RTT_MS = {"native": 0.14, "passthrough": 0.18, "bridge": 0.303, "udp-vnetp": 0.321, "udp-vxlan": 0.321}
# UDP encapsulation stands for one mode of the paper: its own format.
ORDER = ("native", "passthrough", "bridge", "udp-vnetp")
SHAPED = "-1g"
RTT, TCP, UDP = "rtt_avg_us", "tcp_window_gbps", "udp_gbps"

MEASURES = [
    measure(RTT, "RTT average", "µs", 1, "lower"),
    measure("rtt_p50_us", "RTT median", "µs", 0, "lower"),
    measure("rtt_p99_us", "RTT 99th percentile", "µs", 0, "lower"),
    measure(TCP, "TCP, 64 KB windows", "Gb/s", 3),
    measure(UDP, "UDP 1400 B delivered", "Gb/s", 3),
]
HOW = [
    "Two hosts and a guest on each are network namespaces of this machine. Guests' MTU 1500. vnetr with default"
    " settings, on TAP devices.",
    "Native: a veth joins the guests. Passthrough: each host's vnetr wires its guest to the NIC. Direct bridge: lookup,"
    " no encapsulation. UDP: lookup and encapsulation.",
    "Each round sets up, measures and takes down every mode once, in turn, free and with the underlay shaped to 1 Gb/s"
    " by TBF.",
    "RTT: `ping -i 0`, a flood that prints each reply's time.",
    "TCP and UDP by iperf3 as the paper has them by ttcp: 64 KB windows, and 1400 B datagrams as fast as they go; the"
    " figures are the receiver's.",
]


class Shaped(forwarders.Forwarder):
    """Another forwarder, with its underlay shaped to 1 Gb/s."""

    def __init__(self, inner):
        self.inner = inner
        self.key, self.title, self.group = inner.key + SHAPED, inner.title + ", 1 Gb/s", inner.group
        if hasattr(inner, "stop"):
            self.stop = inner.stop

    def check(self):
        self.inner.check()

    def version(self):
        return self.inner.version()

    def set_up(self, lab):
        self.inner.set_up(lab)
        for role, device in self.inner.underlay_devices():
            lab.shape(role, device)


def subjects():
    def encapsulating(encapsulation):
        return lambda side: vnetr.encapsulating(side, encapsulation)

    free = [
        forwarders.Native(),
        forwarders.VnetrForwarder("passthrough", "passthrough", vnetr.passthrough, 0),
        forwarders.VnetrForwarder("bridge", "direct bridge", vnetr.direct_bridge, 0),
        forwarders.VnetrForwarder("udp-vnetp", "UDP, VNET/P", encapsulating("vnetp"), 42),
        forwarders.VnetrForwarder("udp-vxlan", "UDP, VXLAN", encapsulating("vxlan"), 50),
    ]
    return free + [Shaped(forwarder) for forwarder in free]


SMOKE = tuple(mode.key for mode in subjects())
REFERENCES = ("native", "native" + SHAPED)


def work(effort):
    def measured(_mode, lab, turn):
        turn.take((RTT, "rtt_p50_us", "rtt_p99_us"), measures.round_trip, lab, effort)
        turn.take((TCP,), lambda: measures.tcp(lab, effort, window="64K")[0])
        turn.take((UDP,), lambda: measures.udp(lab, effort, measures.UDP_PAYLOAD_BYTES)["delivered"] / 1e9)
    return measured


def paper_table(result, suffix, where):
    """Ours beside the paper's."""
    rows = []
    for subject in result.subjects:
        key = subject["key"]
        plain = key.removesuffix(SHAPED)
        if (key == plain) != (suffix == "") or result.median(key, RTT) is None:
            continue
        native = "native" + suffix
        rows.append([
            subject["title"], number(result.median(key, RTT), 1), number(result.ratio(key, native, RTT), 2),
            number(PAPER_RTT_MS[plain] * 1000, 0), number(PAPER_RTT_MS[plain] / PAPER_RTT_MS["native"], 2),
            number(result.median(key, TCP), 3), number(result.ratio(key, native, TCP), 2),
            number(result.median(key, UDP), 3), number(result.ratio(key, native, UDP), 2),
        ])
    return {
        "title": f"Beside the paper, {where}",
        "columns": ["", "RTT, µs", "÷ native", "paper's RTT, µs", "paper's ÷ native", "TCP, 64 KB, Gb/s",
                    "÷ native", "UDP 1400 B, Gb/s", "÷ native"],
        "rows": rows,
    }


def order_table(result):
    """Whether the modes come in the paper's order: round trips rise, throughput falls."""
    rows = []
    names = {mode.key: mode.title for mode in subjects()}
    for suffix, where in (("", "free"), (SHAPED, "1 Gb/s")):
        for key, title, rising in ((RTT, "RTT", True), (TCP, "TCP, 64 KB windows", False), (UDP, "UDP 1400 B", False)):
            found = [(mode, result.median(mode + suffix, key)) for mode in ORDER]
            if any(value is None for _, value in found):
                continue
            ours = sorted(found, key=lambda each: each[1], reverse=not rising)
            rows.append([f"{title}, {where}", *(", ".join(names[mode] for mode, _ in each) for each in (found, ours)),
                         verdict(found, rising)])
    return {"title": "Order of the modes, best first", "columns": ["", "the paper's", "ours", "the same"], "rows": rows}


def verdict(found, rising):
    """`found`: (mode, figure) in the paper's order. Says by how much those are apart that come the other way round."""
    apart = 0
    for index, (_, first) in enumerate(found):
        for _, second in found[index + 1:]:
            best, worst = (first, second) if rising else (second, first)
            if best > worst:
                apart = max(apart, best / worst - 1 if worst > 0 else float("inf"))
    return "yes" if apart == 0 else f"no, by up to {100 * apart:.0f} %"


def tables(result):
    return [paper_table(result, "", "free"), paper_table(result, SHAPED, "underlay of 1 Gb/s"), order_table(result)]


def plot(result):
    import plots
    return plots.bars(result, lambda subject: subject["group"] == forwarders.OURS)
