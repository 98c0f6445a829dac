"""vhost-user ports beside DPDK's own switches: two virtio-user ports of a generator, one CPU for it and one for the
switch."""

import os
import pathlib
import re
import shutil
import subprocess
import time

import forwarders
import vnetr
from lab import HOST_ADDRESS, Failure, Unavailable
from results import measure, number

NAME = "vhost"
TITLE = "vhost-user ports"
SMOKE = ("vnetr", "testpmd")
MAY_BE_MISSING = ("large_gbps", "link_fps", "link_small_fps", "calls_per_frame")
REFERENCES = ("testpmd", "ovs-dpdk")

SMALL_BYTES, MIDDLE_BYTES = 64, 1400
# As long as a super-frame, in pieces of about a page, as Linux has them.
LARGE_PIECES, LARGE_PIECE_BYTES = 16, 4000
LARGE_BYTES = LARGE_PIECES * LARGE_PIECE_BYTES
MBUF_BYTES = 4096 + 128

MEASURES = [
    measure("small_fps", "64 B, both ways together", "frames/s", 0),
    measure("small_cycles", "64 B, cycles of the switch's CPU a frame", "", 0, "lower"),
    measure("middle_fps", "1400 B, both ways together", "frames/s", 0),
    measure("middle_cycles", "1400 B, cycles of the switch's CPU a frame", "", 0, "lower"),
    measure("large_gbps", "64,000 B, both ways together", "Gb/s", 1),
    measure("link_fps", "1400 B to a VXLAN link", "frames/s", 0),
    measure("link_small_fps", "64 B to a VXLAN link", "frames/s", 0),
    measure("rtt_us", "RTT, polling, one frame under way each way", "µs", 2, "lower"),
    measure("calls_per_frame", "system calls a frame, 64 B", "", 6, "lower"),
]
HOW = [
    "The guests: two virtio-user ports of DPDK's testpmd, rings of 1024, mergeable buffers, in one thread on a CPU of"
    " its own. The switch: one polling thread on another CPU.",
    "Frames circulate: the generator sends each again by the port that sent it when it comes back by the other."
    " Frames/s are what both ports receive.",
    "vnetr: learns and looks up MAC addresses; `dispatch = \"vmm-driven\"`, `yield = \"never\"`. OVS-DPDK: two static"
    " flows by port. testpmd as switch: `--forward-mode=io`, which looks at nothing.",
    "Cycles a frame: the time stamp counter's rate by frames/s. The switch polls all the time, so they hold its waiting"
    " for the generator as well.",
    "64,000 B: frames in 16 pieces of 4,000 B, as long as a super-frame but without a segmentation header, as testpmd"
    " makes none. OVS-DPDK takes no frames above 9,728 B.",
    "VXLAN link: one port sends as fast as it can to a host on a veth, which counts what arrives and drops it there."
    " vnetr: UDP sockets; OVS-DPDK: its userspace tunnel over AF_PACKET.",
    "RTT: two trips through the switch from port to port, with one frame of 64 B circulating each way.",
    "System calls: of the switch's polling thread, by `strace -c`, while 64 B frames circulate.",
    "Each round sets up, measures and takes down every switch once, in turn.",
]

VSWITCHD = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"
HUGE_PAGES = 512
PORT_MAC = ("02:00:00:00:0a:00", "02:00:00:00:0a:01")
REMOTE_MAC = "02:00:00:00:0b:00"
TUNNEL_PORT, VNI = 4789, 42
START_SECONDS_MAX = 30
SETTLE_SECONDS, STARTS_MAX = 1, 8


# --- Huge pages and CPUs ---


def reserve_huge_pages(lab):
    """Huge pages of the lab's own: the machine has as many as before when it ends."""
    setting = pathlib.Path("/proc/sys/vm/nr_hugepages")
    try:
        before = int(setting.read_text())
        lab.at_end(lambda: setting.write_text(str(before)))
        setting.write_text(str(before + HUGE_PAGES))
        if int(setting.read_text()) < before + HUGE_PAGES:
            raise Unavailable(f"this machine has no {HUGE_PAGES} huge pages to spare")
    except OSError as error:
        raise Unavailable(f"huge pages cannot be reserved: {error}") from None
    lab.huge = lab.folder / "huge"
    lab.huge.mkdir()
    lab.run(None, "mount", "-t", "hugetlbfs", "none", lab.huge)
    lab.at_end(lambda: subprocess.run(["umount", lab.huge], check=False))


def cpus():
    """The generator's and the switch's."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        raise Unavailable("it takes two CPUs, one for the generator and one for the switch")
    return mine[-1], mine[-2]


def dpdk_arguments(lab, name, cpu):
    prefix = f"{lab.prefix}{name}"
    lab.at_end(lambda: shutil.rmtree(f"/var/run/dpdk/{prefix}", ignore_errors=True))
    return ["--no-pci", f"--file-prefix={prefix}", f"--huge-dir={lab.huge}", "--no-telemetry", "-m", "256",
            "--lcores", f"0@{cpu},1@{cpu}"]


# --- testpmd ---


class Testpmd:
    """A testpmd that is told what to do on its standard input."""

    def __init__(self, lab, name, cpu, devices, options):
        self.lab = lab
        # A virtio-user port passes on its memory as few files as a message has room for.
        # What it prints is to be read line by line while it runs.
        command = ["stdbuf", "--output=L", "dpdk-testpmd", *dpdk_arguments(lab, name, cpu), "--single-file-segments",
                   *(f"--vdev={device}" for device in devices), "--", "-i", "--nb-cores=1", *options]
        self.process = lab.start(None, *command, output=f"{name}.log", standard_input=subprocess.PIPE)
        lab.until(lambda: "testpmd>" in self.text(), START_SECONDS_MAX, f"testpmd {name}", self.process)

    def text(self):
        return self.process.log.read_text(errors="replace")

    def tell(self, *commands):
        for command in commands:
            self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def end(self):
        self.tell("stop", "quit")
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            raise Failure("testpmd does not end") from None


class Generator(Testpmd):
    """Frames that circulate between the two ports of a switch, or go to one."""

    made = 0

    def __init__(self, lab, sockets, burst=64):
        devices = [
            f"net_virtio_user{index},path={socket},queue_size=1024,mac={PORT_MAC[index]},mrg_rxbuf=1"
            for index, socket in enumerate(sockets)]
        peers = [PORT_MAC[1], PORT_MAC[0]] if len(sockets) == 2 else [REMOTE_MAC]
        options = ["--txd=1024", "--rxd=1024", f"--burst={burst}", f"--mbuf-size={MBUF_BYTES}",
                   "--total-num-mbufs=16384", *(f"--eth-peer={index},{mac}" for index, mac in enumerate(peers))]
        Generator.made += 1
        super().__init__(lab, f"gen{Generator.made}", cpus()[0], devices, options)

    def circulate(self, pieces, bursts, seconds):
        """Frames a second that both ports receive."""
        self.tell("set fwd io", "set txpkts " + ",".join(map(str, pieces)), "set record-core-cycles on")
        # A switch that just saw a port come up may drop the frames that are to circulate, for seconds.
        for _ in range(STARTS_MAX):
            time.sleep(SETTLE_SECONDS)
            self.tell(f"start tx_first {bursts}")
            time.sleep(0.5)
            before, first = self.received(), self.received()
            if first[1] > before[1]:
                break
            self.tell("stop")
        time.sleep(seconds)
        last = self.received()
        if last[1] == first[1]:
            raise Failure("no frame circulates")
        return (last[1] - first[1]) / (last[0] - first[0])

    def received(self):
        """(the time, frames) of both ports together."""
        before = self.text().count("Tx-pps:")
        ports = len(PORT_MAC)
        self.tell("show port stats all")
        moment = time.monotonic()
        self.lab.until(lambda: self.text().count("Tx-pps:") >= before + ports, 10, "testpmd's statistics", self.process)
        counts = re.findall(r"RX-packets: (\d+)", self.text())[-ports:]
        return moment, sum(map(int, counts))


def cycles_per_second(lab):
    """Of the time stamp counter, as the generator found it."""
    for log in sorted(lab.folder.glob("gen*.log"), reverse=True):
        found = re.search(r"at (\d+) MHz Clock", log.read_text(errors="replace"))
        if found:
            return int(found[1]) * 1e6
    raise Failure("testpmd told no clock rate")


# --- The switches ---


class Switch(forwarders.Forwarder):
    needs, package = ("dpdk-testpmd",), "dpdk"
    group = "DPDK"
    carries_large, has_link = True, True

    def set_up(self, lab):
        """What all the work shares; each work starts a switch of its own."""
        cpus()
        reserve_huge_pages(lab)

    def between_ports(self, lab, mtu):
        """Starts it with two ports; returns their sockets and what ends it."""
        raise NotImplementedError

    def to_link(self, lab):
        """Starts it on host A with one port and a VXLAN link; returns the port's socket and what ends it."""
        raise NotImplementedError

    def polling_thread(self, lab):
        """The thread that polls, of the switch that runs."""
        raise NotImplementedError


def thread_named(process, *starts):
    for task in os.listdir(f"/proc/{process.pid}/task"):
        name = pathlib.Path(f"/proc/{process.pid}/task/{task}/comm").read_text()
        if name.startswith(starts):
            return int(task)
    raise Failure(f"no thread of {process.args[0]} is called {' or '.join(starts)}")


class VnetrSwitch(Switch):
    key, title, group = "vnetr", "vnetr", forwarders.OURS

    def version(self):
        return forwarders.first_line(vnetr.binary, "--version")

    def _start(self, lab, configuration, role):
        tuning = vnetr.section("tuning", cpus=str(cpus()[1]), dispatch="vmm-driven", **{"yield": "never"})
        self.running = vnetr.Vnetr(lab, "A", configuration + tuning, role=role)
        self.process = self.running.process
        return self.running.stop

    def between_ports(self, lab, mtu):
        sockets = [lab.folder / f"port{index}.sock" for index in range(2)]
        ports = "".join(
            vnetr.port(f"vm{index}", "vhost-user", socket=str(socket), domain="blue", mtu=mtu)
            for index, socket in enumerate(sockets))
        underlay = vnetr.section("underlay", address="127.0.0.1")
        return sockets, self._start(lab, vnetr.domain() + ports + underlay, None)

    def to_link(self, lab):
        socket = lab.folder / "port.sock"
        port = vnetr.port("vm1", "vhost-user", socket=str(socket), domain="blue", mtu=1500)
        link = vnetr.link("peer", HOST_ADDRESS["B"], encapsulation="vxlan", domains=["blue"])
        end = self._start(lab, vnetr.domain() + port + vnetr.underlay("A") + link, "hostA")
        # The remote guest is heard once, so that its address is known.
        frame = bytes.fromhex(("ff" * 6) + REMOTE_MAC.replace(":", "") + "88b5") + bytes(46)
        header = bytes([8, 0, 0, 0]) + VNI.to_bytes(3, "big") + b"\0"
        lab.run("hostB", "/usr/bin/python3", "-c",
                "import socket, sys; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto("
                "bytes.fromhex(sys.argv[1]), (sys.argv[2], int(sys.argv[3])))",
                (header + frame).hex(), HOST_ADDRESS["A"], TUNNEL_PORT)
        return socket, end

    def polling_thread(self, lab):
        return thread_named(self.process, "vnetr-worker")


class OVSSwitch(Switch):
    key, title = "ovs-dpdk", "OVS-DPDK"
    needs, package = ("dpdk-testpmd", "ovsdb-tool", "ovs-vsctl", VSWITCHD), "dpdk openvswitch-switch-dpdk"
    carries_large = False

    def version(self):
        return forwarders.debian_version("openvswitch-switch-dpdk")

    def _start(self, lab, role):
        self.folder = folder = lab.folder / f"ovs{len(lab.processes)}"
        folder.mkdir()
        self.environment = {"OVS_RUNDIR": str(folder), "OVS_LOGDIR": str(folder), "PATH": forwarders.search_path()}
        socket = folder / "db.sock"
        lab.run(None, "ovsdb-tool", "create", folder / "conf.db", "/usr/share/openvswitch/vswitch.ovsschema")
        database = lab.start(role, "ovsdb-server", f"--remote=punix:{socket}", folder / "conf.db",
                             environment=self.environment)
        lab.until(socket.exists, 10, "ovsdb-server", database)
        mask = hex(1 << cpus()[1])
        prefix = f"{lab.prefix}ovs"
        lab.at_end(lambda: shutil.rmtree(f"/var/run/dpdk/{prefix}", ignore_errors=True))
        self._configure(lab, role, "--no-wait", "init", "--", "set", "Open_vSwitch", ".",
                        "other_config:dpdk-init=true", f"other_config:dpdk-lcore-mask={mask}",
                        f"other_config:pmd-cpu-mask={mask}", "other_config:dpdk-socket-mem=256",
                        f"other_config:dpdk-hugepage-dir={lab.huge}",
                        f'other_config:dpdk-extra="--no-pci --file-prefix={prefix}"')
        self.process = lab.start(role, VSWITCHD, f"unix:{socket}", environment=self.environment)
        lab.until(lambda: list(folder.glob("ovs-vswitchd*.ctl")), START_SECONDS_MAX, "OVS-DPDK", self.process)

        def end():
            for process in (self.process, database):
                process.terminate()
                process.wait(20)
        return end

    def _configure(self, lab, role, *arguments):
        lab.run(role, "env", f"OVS_RUNDIR={self.folder}", "ovs-vsctl", f"--db=unix:{self.folder / 'db.sock'}",
                "--timeout=30", *arguments)

    def _flow(self, lab, role, from_port, to_port):
        lab.run(role, "env", f"OVS_RUNDIR={self.folder}", "ovs-ofctl", "add-flow",
                f"unix:{self.folder / 'br0.mgmt'}", f"priority=100,in_port={from_port},actions=output:{to_port}")

    def between_ports(self, lab, mtu):
        end = self._start(lab, None)
        ports = [part for name in ("v0", "v1") for part in (
            "--", "add-port", "br0", name, "--", "set", "interface", name, "type=dpdkvhostuser")]
        self._configure(lab, None, "add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev", *ports)
        self._flow(lab, None, 1, 2)
        self._flow(lab, None, 2, 1)
        return [self.folder / "v0", self.folder / "v1"], end

    def to_link(self, lab):
        host = "hostA"
        end = self._start(lab, host)
        lab.run(host, "ethtool", "-K", "nic", "tx", "off", "tso", "off", "gso", "off", "gro", "off")
        lab.ip(host, "address", "flush", "dev", "nic")
        self._configure(
            lab, host, "add-br", "br-phy", "--", "set", "bridge", "br-phy", "datapath_type=netdev",
            "--", "add-port", "br-phy", "nic",
            "--", "add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev",
            "--", "add-port", "br0", "v0", "--", "set", "interface", "v0", "type=dpdkvhostuser", "ofport_request=1",
            "--", "add-port", "br0", "vx0", "--", "set", "interface", "vx0", "type=vxlan", "ofport_request=2",
            f"options:remote_ip={HOST_ADDRESS['B']}", f"options:key={VNI}")
        lab.ip(host, "link", "set", "br-phy", "mtu", forwarders.UNDERLAY_MTU_BYTES, "up")
        lab.ip(host, "address", "add", HOST_ADDRESS["A"] + "/24", "dev", "br-phy")
        lab.run(host, "ping", "-c", 3, "-i", 0.2, HOST_ADDRESS["B"], check=False)
        self._flow(lab, host, 1, 2)
        return self.folder / "v0", end

    def polling_thread(self, lab):
        return thread_named(self.process, "pmd-c")


class TestpmdSwitch(Switch):
    key, title = "testpmd", "testpmd as switch"
    has_link = False
    made = 0

    def version(self):
        return forwarders.debian_version("dpdk")

    def between_ports(self, lab, mtu):
        TestpmdSwitch.made += 1
        name = f"switch{TestpmdSwitch.made}"
        sockets = [lab.folder / f"{name}-{index}.sock" for index in range(2)]
        devices = [f"net_vhost{index},iface={socket}" for index, socket in enumerate(sockets)]
        options = ["--forward-mode=io", "--burst=64", "--auto-start", "--total-num-mbufs=65536"]
        testpmd = Testpmd(lab, name, cpus()[1], devices, options)
        self.process = testpmd.process
        return sockets, testpmd.end

    def polling_thread(self, lab):
        return thread_named(self.process, "rte-worker-1", "lcore-worker-1")


# --- The work ---


def counted_at_host_b(lab):
    """(VXLAN datagrams' bytes and packets) that arrived at host B and were dropped there."""
    text = lab.run("hostB", "nft", "list", "chain", "ip", "sink", "arrived")
    packets, counted = map(int, re.search(r"packets (\d+) bytes (\d+)", text).groups())
    return packets, counted


def frames_between(first, last, frame_bytes):
    """A train arrives in one piece: its frames follow from its bytes."""
    packets, counted = (after - before for before, after in zip(first, last))
    return (counted - 28 * packets) / (8 + frame_bytes)


def to_link(switch, lab, effort):
    lab.join_hosts(forwarders.UNDERLAY_MTU_BYTES)
    lab.run("hostB", "nft", "-f", "-", text=f"""
table ip sink {{
  chain arrived {{
    type filter hook prerouting priority raw;
    udp dport {TUNNEL_PORT} counter drop
  }}
}}
""")
    socket, end = switch.to_link(lab)
    generator = Generator(lab, [socket])
    rates = {}
    for key, frame_bytes in (("link_fps", MIDDLE_BYTES), ("link_small_fps", SMALL_BYTES)):
        before = counted_at_host_b(lab)
        generator.tell("set fwd txonly", f"set txpkts {frame_bytes}", "start")
        lab.until(lambda before=before: counted_at_host_b(lab) != before, START_SECONDS_MAX,
                  "a frame at the other host", switch.process)
        time.sleep(0.5)
        began, first = time.monotonic(), counted_at_host_b(lab)
        time.sleep(effort.seconds)
        ended, last = time.monotonic(), counted_at_host_b(lab)
        generator.tell("stop")
        # What waits in the rings is of this length still.
        time.sleep(0.5)
        rates[key] = frames_between(first, last, frame_bytes) / (ended - began)
    generator.end()
    end()
    return rates


def calls_per_frame(switch, lab, generator, effort):
    if not shutil.which("strace"):
        return None
    thread = switch.polling_thread(lab)
    first = generator.received()
    lab.run(None, "timeout", "--signal=INT", effort.seconds, "strace", "-c", "-o", lab.folder / "calls", "-p", thread,
            check=False)
    text = (lab.folder / "calls").read_text()
    frames = generator.received()[1] - first[1]
    total = re.search(r"^\s*[\d.]+\s+[\d.]+\s+\d*\s+(\d+).*total$", text, re.MULTILINE)
    return (int(total[1]) if total else 0) / frames


def circulating(switch, lab, effort):
    sockets, end = switch.between_ports(lab, 1500)
    generator = Generator(lab, sockets)
    small = generator.circulate([SMALL_BYTES], 16, effort.seconds)
    calls = calls_per_frame(switch, lab, generator, effort)
    generator.end()
    rate = cycles_per_second(lab)
    generator = Generator(lab, sockets)
    middle = generator.circulate([MIDDLE_BYTES], 8, effort.seconds)
    generator.end()
    generator = Generator(lab, sockets, burst=1)
    lonely = generator.circulate([SMALL_BYTES], 1, effort.seconds)
    generator.end()
    end()
    # Each port's frame makes lonely / 2 trips a second.
    return {
        "small_fps": small, "small_cycles": rate / small, "middle_fps": middle, "middle_cycles": rate / middle,
        "rtt_us": 2e6 / (lonely / 2), "calls_per_frame": calls,
    }


def large(switch, lab, effort):
    sockets, end = switch.between_ports(lab, 65_000)
    generator = Generator(lab, sockets, burst=16)
    rate = generator.circulate([LARGE_PIECE_BYTES] * LARGE_PIECES, 1, effort.seconds)
    generator.end()
    end()
    return rate * LARGE_BYTES * 8 / 1e9


def work(effort):
    def measured(switch, lab, turn):
        turn.take(("small_fps", "small_cycles", "middle_fps", "middle_cycles", "rtt_us", "calls_per_frame"),
                  circulating, switch, lab, effort)
        if switch.carries_large:
            turn.take(("large_gbps",), large, switch, lab, effort)
        if switch.has_link:
            turn.take(("link_fps", "link_small_fps"), to_link, switch, lab, effort)
    return measured


def prepare(switch, lab):
    switch.check()
    switch.set_up(lab)


# The work, the measure's key, what it is compared with, the ratio to reach and the better one.
TARGETS = [
    ("64 B frames between two ports", "small_fps", "ovs-dpdk", 1.4, None),
    ("the same in cycles a frame", "small_cycles", "testpmd", 1.1, 0.8),
    ("64,000 B frames between two ports", "large_gbps", "testpmd", 1.0, None),
    ("guest to VXLAN link, 1400 B", "link_fps", "ovs-dpdk", 3, 6),
]


def tables(result):
    if not any(subject["key"] == "vnetr" for subject in result.subjects):
        return []
    columns = {column["key"]: column for column in MEASURES}
    rows = []
    for title, key, against, least, better in TARGETS:
        lower = columns[key]["better"] == "lower"
        value = result.ratio("vnetr", against, key) if result.document["values"].get(against) else None
        rows.append([title, against, *bounds(lower, least, better), number(value, 2),
                     verdict(value, lower, least, better)])
    calls = result.median("vnetr", "calls_per_frame")
    # What control asks once a second is none of a frame's: less than one in a million is none.
    none = None if calls is None else round(calls, 6)
    rows.append(["system calls a frame while polling", "", "0", "", number(calls, 6), verdict(none, True, 0, None)])
    return [{"title": "Targets for vnetr", "columns": ["work", "against", "at least", "better", "here", "verdict"],
             "rows": rows}]


def bounds(lower, least, better):
    sign = "≤ " if lower else "≥ "
    return sign + f"{least:g} ×", sign + f"{better:g} ×" if better is not None else ""


def verdict(value, lower, least, better):
    if value is None:
        return "not measured"
    if better is not None and (value <= better if lower else value >= better):
        return "better reached"
    return "reached" if (value <= least if lower else value >= least) else "NOT reached"


def subjects():
    return [VnetrSwitch(), OVSSwitch(), TestpmdSwitch()]


def plot(result):
    import plots
    return plots.bars(result, lambda subject: subject["group"] == forwarders.OURS)
