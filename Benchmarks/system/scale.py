"""How throughput, memory and start time grow with ports, links, domains, MAC addresses and routes."""

import json
import pathlib
import sys
import time

import forwarders
import measures
import vnetr
from lab import GUEST_MTU_BYTES, HOST_ADDRESS, SIDES, other
from results import measure

NAME = "scale"
TITLE = "How it scales"
MAY_BE_MISSING = ()
REFERENCES = ()

DIMENSIONS = {
    "ports": (1, 4, 16, 64),
    "links": (1, 10, 100, 1_000),
    "domains": (1, 10, 100, 1_000),
    "macs": (1_000, 10_000, 100_000, 1_000_000),
    "routes": (10, 100, 1_000, 10_000),
}
TITLES = {"macs": "MAC addresses"}
MACS_MAX = 1 << 20
# Frames a second, which a forwarder that also learns keeps up with; what was lost is sent again.
TEACH_FRAMES_PER_SECOND = 50_000
TEACH_PASSES_MAX = 4

MEASURES = [
    measure("start_seconds", "start until ready", "s", 2, "lower"),
    measure("start_mib", "resident memory at start", "MiB", 1, "lower"),
    measure("end_mib", "resident memory after the work", "MiB", 1, "lower"),
    measure("rtt_avg_us", "RTT average", "µs", 1, "lower"),
    measure("tcp_gbps", "TCP, 1 flow", "Gb/s"),
    measure("udp_small_fps", "UDP 64 B delivered", "frames/s", 0),
    measure("macs_learned", "addresses learned", "", 0),
    measure("macs_fps", "frames to all addresses in turn", "frames/s", 0),
]
HOW = [
    "Two hosts and a guest on each are network namespaces of this machine; VXLAN over TAP, guests' MTU 1500, underlay's"
    " 1600, default settings. Traffic runs between the two guests; start time and memory are those of host A's vnetr.",
    "Ports: TAP devices of host A in the guests' domain.",
    "Links: of host A in the guests' domain, all but one to addresses where nobody answers.",
    "Domains: of both hosts, all on their link.",
    "Routes: of both hosts, exact rules that match no frame, beside the two that do, in place of learning.",
    "MAC addresses: guest A sends a frame from each, so that both hosts learn them; then guest B sends to each in turn,"
    " as fast as one thread of Python does.",
    "The MAC table of each size has room for twice as many, at most 1,048,576.",
    "Each round sets up, measures and takes down every size once, in turn. RTT: `ping -i 0`. TCP and UDP by iperf3.",
]


class Size(forwarders.VnetrForwarder):
    def __init__(self, dimension, count):
        self.dimension, self.count, self.part = dimension, count, dimension
        super().__init__(f"{dimension}-{count}", f"{TITLES.get(dimension, dimension)}: {count:,}", self.of_side)

    def facts(self):
        return {"dimension": self.dimension, "count": self.count}

    def of_side(self, side):
        count = {dimension: 0 for dimension in DIMENSIONS} | {self.dimension: self.count}
        # Ports and links of host A alone: the other has its guest's and the one back.
        more = side == "A"
        options = {}
        if count["macs"]:
            options["macs_max"] = min(MACS_MAX, 2 * self.count)
        if count["routes"]:
            options["forwarding"] = "routes"
        parts = [vnetr.domain(**options), vnetr.guest_port(), vnetr.underlay(side)]
        parts.append(vnetr.link("peer", HOST_ADDRESS[other(side)]))
        if more:
            parts += [vnetr.port(f"more{number}", domain="blue", mtu=GUEST_MTU_BYTES)
                      for number in range(1, count["ports"])]
            parts += [vnetr.link(f"more{number}", f"10.98.{number >> 8}.{number & 255}")
                      for number in range(1, count["links"])]
        parts += [vnetr.domain(f"more{number}", 1_000 + number) for number in range(1, count["domains"])]
        if count["routes"]:
            parts.append(vnetr.route(source="any", destination="any", **{"from": "port:vm1"}, to="link:peer"))
            parts.append(vnetr.route(source="any", destination="any", **{"from": "link:peer"}, to="port:vm1"))
            for number in range(2, count["routes"]):
                address = f"{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
                parts.append(vnetr.route(
                    source="02:00:01:" + address, destination="02:00:02:" + address, to="link:peer"))
        return "".join(parts)

    def set_up(self, lab):
        super().set_up(lab)
        # Links to nobody need a way that swallows their datagrams.
        lab.ip("hostA", "route", "add", "10.98.0.0/16", "via", HOST_ADDRESS["B"])
        self.start_mib = self.running["A"].resident_bytes() / 2**20

    def learned(self):
        """Addresses that both hosts know."""
        return min(self.running[side].counters()["domains"]["blue"]["macs_learned"] for side in SIDES)


def subjects():
    return [Size(dimension, count) for dimension, counts in DIMENSIONS.items() for count in counts]


SMOKE = ("ports-4", "links-10", "domains-10", "macs-1000", "routes-100")


def guest_mac(lab, side):
    return json.loads(lab.run("guest" + side, "ip", "-json", "link", "show", "dev", "eth0"))[0]["address"]


def send_frames(lab, side, how, seconds_max, **arguments):
    """Sends from a guest by frames.py, and returns the seconds that it took."""
    text = lab.run("guest" + side, sys.executable, pathlib.Path(__file__).with_name("frames.py"), how,
                   json.dumps(arguments), seconds_max=seconds_max)
    return float(text)


def teach(size, lab):
    for _ in range(TEACH_PASSES_MAX):
        send_frames(lab, "A", "from-each", 60 + size.count / TEACH_FRAMES_PER_SECOND * 4, count=size.count,
                    other=guest_mac(lab, "B"), frames_per_second=TEACH_FRAMES_PER_SECOND)
        learned = size.learned()
        if learned >= size.count:
            break
    return learned


def to_all(size, lab, effort):
    def arrived():
        return size.running["A"].counters()["ports"]["vm1"]["out_frames"]

    before = arrived()
    seconds = send_frames(lab, "B", "to-each", effort.seconds + 60, count=size.count, other=guest_mac(lab, "B"),
                          seconds=0.2 if effort.smoke else effort.seconds)
    time.sleep(0.1)
    return (arrived() - before) / seconds


def work(effort):
    def measured(size, lab, turn):
        turn.figures.update(start_seconds=size.running["A"].start_seconds, start_mib=size.start_mib)
        if size.dimension == "macs":
            turn.take(("macs_learned",), teach, size, lab)
            turn.take(("macs_fps",), to_all, size, lab, effort)
        turn.take(("rtt_avg_us",), lambda: measures.round_trip(lab, effort)["rtt_avg_us"])
        turn.take(("tcp_gbps",), lambda: measures.tcp(lab, effort)[0])
        turn.take(("udp_small_fps",), lambda: measures.udp(
            lab, effort, measures.PAYLOAD_BYTES_OF_64_BYTE_FRAME)["datagrams_per_second"])
        turn.take(("end_mib",), lambda: size.running["A"].resident_bytes() / 2**20)
    return measured


def tables(_result):
    return []


def plot(result):
    import plots
    return plots.lines(plots.growth(
        result, lambda size: TITLES.get(size["dimension"], size["dimension"]), lambda size: size["count"],
        x="how many"))
