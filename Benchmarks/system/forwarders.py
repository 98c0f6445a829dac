"""What may carry frames between the two guests: one class each, which sets it up in a lab.

Each has the settings that its documentation calls best for throughput without protection, as far as it has such.
"""

import os
import pathlib
import re
import shutil
import subprocess
import time

import vnetr
from lab import GUEST_ADDRESS, GUEST_MTU_BYTES, HOST_ADDRESS, SIDES, Failure, Unavailable, other, tail

# Room for a guest's frame of 1500 B and what any of them adds, so that none fragments.
UNDERLAY_MTU_BYTES = 1600

KERNEL = "kernel"
OURS = "vnetr"
USER_SPACE_LAYER_2 = "user space, layer 2"
USER_SPACE_LAYER_3 = "user space, layer 3"


def first_line(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return "unknown"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0].strip() if lines else "unknown"


def debian_version(package):
    return first_line("dpkg-query", "--show", "--showformat=${Version}", package)


class Forwarder:
    key = title = group = ""
    # Commands that must be there, and the Debian package that has them.
    needs, package = (), ""
    # What it adds to a guest's frame on the underlay, its Ethernet header counted in; None where that varies.
    added_bytes = None
    # What `--only` names it by, with others, beside its key; whether it is measured whatever `--only` says.
    part, is_always = None, False

    def facts(self):
        """What the result keeps of it, beside key and title."""
        return {"group": self.group}

    def check(self):
        missing = [command for command in self.needs if not shutil.which(command, path=search_path())]
        if missing:
            raise Unavailable(f"{', '.join(missing)} not found: Debian package {self.package}")

    def version(self):
        return debian_version(self.package)

    def set_up(self, lab):
        raise NotImplementedError

    def underlay_devices(self):
        """Where a shaper belongs: (role, device)."""
        return [("host" + side, "nic") for side in SIDES]


def search_path():
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Native(Forwarder):
    key, title, group = "native", "native", KERNEL
    added_bytes = 0

    def version(self):
        return "a veth joins the guests, " + kernel_version()

    def set_up(self, lab):
        lab.guests()
        lab.join_guests()

    def underlay_devices(self):
        return [("guest" + side, "eth0") for side in SIDES]


def kernel_version():
    return "Linux " + os.uname().release


class KernelBridge(Forwarder):
    key, title, group = "bridge", "kernel bridge", KERNEL
    added_bytes = 0

    def version(self):
        return kernel_version()

    def set_up(self, lab):
        lab.join_hosts(UNDERLAY_MTU_BYTES, addresses=False)
        lab.guests()
        for side in SIDES:
            lab.plug_veth(side)
            host = "host" + side
            lab.ip(host, "link", "add", "br0", "type", "bridge")
            lab.ip(host, "link", "set", "br0", "up")
            for device in ("nic", "vm1"):
                lab.ip(host, "link", "set", device, "master", "br0")


class KernelVXLAN(Forwarder):
    key, title, group = "vxlan", "kernel VXLAN", KERNEL
    added_bytes = 50

    def version(self):
        return kernel_version()

    def set_up(self, lab):
        lab.join_hosts(UNDERLAY_MTU_BYTES)
        lab.guests()
        for side in SIDES:
            lab.plug_veth(side)
            host = "host" + side
            lab.ip(host, "link", "add", "br0", "type", "bridge")
            lab.ip(host, "link", "set", "br0", "up")
            lab.ip(host, "link", "add", "vx0", "type", "vxlan", "id", 42, "local", HOST_ADDRESS[side],
                   "remote", HOST_ADDRESS[other(side)], "dstport", 4789, "dev", "nic")
            lab.ip(host, "link", "set", "vx0", "mtu", GUEST_MTU_BYTES, "master", "br0", "up")
            lab.ip(host, "link", "set", "vm1", "master", "br0")


class VnetrForwarder(Forwarder):
    """`configuration` is a function of the side."""

    group = OURS

    def __init__(self, key="vnetr", title="vnetr", configuration=vnetr.encapsulating, added_bytes=50, flags=()):
        self.key, self.title, self.added_bytes, self.flags = key, title, added_bytes, flags
        self.configuration = configuration
        self.running = {}

    def version(self):
        return first_line(vnetr.binary, "--version")

    def set_up(self, lab):
        self.running = {}
        lab.join_hosts(UNDERLAY_MTU_BYTES if self.added_bytes else GUEST_MTU_BYTES, addresses=self.added_bytes > 0)
        lab.guests()
        for side in SIDES:
            self.running[side] = vnetr.Vnetr(lab, side, self.configuration(side), self.flags)
            lab.plug_device(side, "vm1")

    def stop(self):
        for process in self.running.values():
            process.stop()


class OpenVSwitch(Forwarder):
    """The userspace datapath. It does not do the checksums and segments that devices put off: these are off."""

    key, title, group = "ovs", "Open vSwitch userspace", USER_SPACE_LAYER_2
    needs, package = ("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl"), "openvswitch-switch"
    added_bytes = 50

    def set_up(self, lab):
        lab.join_hosts(UNDERLAY_MTU_BYTES, addresses=False)
        lab.guests()
        for side in SIDES:
            lab.plug_veth(side)
            self._host(lab, side)

    def _host(self, lab, side):
        host = "host" + side
        for role, device in ((host, "nic"), (host, "vm1"), ("guest" + side, "eth0")):
            lab.run(role, "ethtool", "-K", device, "tx", "off", "tso", "off", "gso", "off", "gro", "off")
        folder = lab.folder / ("ovs" + side)
        folder.mkdir()
        environment = {"OVS_RUNDIR": str(folder), "OVS_LOGDIR": str(folder), "PATH": search_path()}
        lab.run(None, "ovsdb-tool", "create", folder / "conf.db", "/usr/share/openvswitch/vswitch.ovsschema")
        socket = folder / "db.sock"
        lab.start(host, "ovsdb-server", f"--remote=punix:{socket}", folder / "conf.db", environment=environment)
        lab.until(socket.exists, 10, "ovsdb-server")

        def configure(*arguments):
            lab.run(host, "env", f"OVS_RUNDIR={folder}", "ovs-vsctl", f"--db=unix:{socket}", "--timeout=20", *arguments)

        configure("--no-wait", "init")
        lab.start(host, "ovs-vswitchd", f"unix:{socket}", environment=environment)
        configure(
            "add-br", "br-phy", "--", "set", "bridge", "br-phy", "datapath_type=netdev",
            "--", "add-port", "br-phy", "nic",
            "--", "add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev", "--", "add-port", "br0", "vm1",
            "--", "add-port", "br0", "vx0", "--", "set", "interface", "vx0", "type=vxlan",
            f"options:remote_ip={HOST_ADDRESS[other(side)]}", "options:key=42")
        lab.ip(host, "link", "set", "br-phy", "mtu", UNDERLAY_MTU_BYTES, "up")
        lab.ip(host, "address", "add", HOST_ADDRESS[side] + "/24", "dev", "br-phy")
        lab.ip(host, "link", "set", "br0", "up")


class TapForwarder(Forwarder):
    """A process on each host that makes a TAP device, or a TUN, for the guest."""

    group = USER_SPACE_LAYER_2

    def set_up(self, lab):
        lab.join_hosts(UNDERLAY_MTU_BYTES)
        lab.guests()
        self.begin(lab)
        processes = {side: self.start(lab, side) for side in SIDES}
        for side, process in processes.items():
            lab.plug_device(side, self.device(side), process)
        self.settle(lab)

    def begin(self, lab):
        """What comes before the processes."""

    def start(self, lab, side):
        """Starts and returns the process of a side."""
        raise NotImplementedError

    def device(self, _side):
        return "vm1"

    def settle(self, lab):
        """What comes when the guests have their devices."""


class Tinc(TapForwarder):
    """Switch mode, without cipher and digest."""

    key, title = "tinc", "tinc"
    needs, package = ("tincd",), "tinc"
    # Made once: they take longer than a measurement. By side: files of the configuration's folder.
    keys = {}

    def begin(self, lab):
        folders = {side: self._folder(lab, side) for side in SIDES}
        for side, folder in folders.items():
            (folder / "hosts").mkdir(parents=True)
            (folder / "tinc.conf").write_text(
                f"Name={side}\nMode=switch\nInterface=vm1\nDeviceType=tap\nConnectTo={other(side)}\n")
            host = folder / "hosts" / side
            host.write_text(f"Address={HOST_ADDRESS[side]}\nCipher=none\nDigest=none\nCompression=0\n")
            if side not in self.keys:
                lab.run(None, "tincd", "-c", folder, "-K", "2048", text="\n\n")
                self.keys[side] = ((folder / "rsa_key.priv").read_text(), host.read_text())
            else:
                private = folder / "rsa_key.priv"
                private.write_text(self.keys[side][0])
                private.chmod(0o600)
                host.write_text(self.keys[side][1])
        for side, folder in folders.items():
            (folder / "hosts" / other(side)).write_text(self.keys[other(side)][1])

    def _folder(self, lab, side):
        return lab.folder / ("tinc" + side)

    def start(self, lab, side):
        folder = self._folder(lab, side)
        return lab.start("host" + side, "tincd", "-D", "-c", folder, f"--pidfile={folder}/pid")

    def settle(self, lab):
        # Until it has found out what the underlay carries it goes by TCP.
        lab.await_guests()
        lab.run("guestA", "ping", "-c", 20, "-i", 0.1, "-s", 1472, "-q", GUEST_ADDRESS["B"], check=False)
        time.sleep(1)


class Socat(TapForwarder):
    key, title = "socat", "socat"
    needs, package = ("socat",), "socat"
    # The bare frame in UDP: Ethernet 14, IPv4 20, UDP 8.
    added_bytes = 42

    def start(self, lab, side):
        return lab.start("host" + side, "socat", "-b", 65536, "TUN,tun-type=tap,tun-name=vm1,iff-no-pi,up",
                         f"UDP4-DATAGRAM:{HOST_ADDRESS[other(side)]}:4789,bind={HOST_ADDRESS[side]}:4789")


class VDE(TapForwarder):
    """A plug on a TAP wired to one on UDP."""

    key, title = "vde", "VDE"
    needs, package = ("vde_plug",), "vdeplug"
    added_bytes = 42

    def start(self, lab, side):
        host = "host" + side
        lab.ip(host, "tuntap", "add", "vm1", "mode", "tap")
        lab.ip(host, "link", "set", "vm1", "up")
        process = lab.start(
            host, "vde_plug", "tap://vm1", f"udp://{HOST_ADDRESS[side]}:4789->{HOST_ADDRESS[other(side)]}:4789")
        lab.until(lambda: "LOWER_UP" in lab.ip(host, "link", "show", "vm1"), 10, "vde_plug", process)
        return process


class N2N(TapForwarder):
    """Edges on both hosts and a supernode on host A. It always encrypts (Twofish)."""

    key, title = "n2n", "n2n"
    needs, package = ("edge", "supernode"), "n2n"

    def begin(self, lab):
        lab.start("hostA", "supernode", "-l", 7654)
        time.sleep(0.2)

    def start(self, lab, side):
        mac = "02:00:00:00:00:0" + side.lower()
        return lab.start("host" + side, "edge", "-d", "vm1", "-a", GUEST_ADDRESS[side], "-c", "bench", "-k", "bench",
                         "-l", f"{HOST_ADDRESS['A']}:7654", "-m", mac, "-M", GUEST_MTU_BYTES, "-p", 7655, "-r")

    def settle(self, lab):
        lab.await_guests()
        # Until the edges know each other the supernode relays.
        time.sleep(2)


class OpenVPN(TapForwarder):
    """TAP over UDP, point to point, without cipher, digest and TLS."""

    key, title = "openvpn", "OpenVPN TAP"
    needs, package = ("openvpn",), "openvpn"

    def start(self, lab, side):
        return lab.start(
            "host" + side, "openvpn", "--dev", "vm1", "--dev-type", "tap", "--proto", "udp",
            "--local", HOST_ADDRESS[side], "--remote", HOST_ADDRESS[other(side)], "--port", 1194,
            "--tun-mtu", GUEST_MTU_BYTES, "--mssfix", 0, "--fast-io", "--sndbuf", 0, "--rcvbuf", 0,
            "--txqueuelen", 1000, "--cipher", "none", "--auth", "none")


class WireGuardGo(TapForwarder):
    """Encrypted, and layer 3: here for scale."""

    key, title, group = "wireguard-go", "wireguard-go", USER_SPACE_LAYER_3
    needs, package = ("wireguard-go", "wg"), "wireguard-go wireguard-tools"
    public = {}

    def version(self):
        return debian_version("wireguard-go")

    def begin(self, lab):
        self.public = {}
        for side in SIDES:
            private = lab.run(None, "wg", "genkey")
            key = lab.folder / ("key" + side)
            key.touch(0o600)
            key.write_text(private)
            self.public[side] = lab.run(None, "wg", "pubkey", text=private).strip()

    def device(self, side):
        # Its control socket's folder is common to all namespaces, so the names are not the same on both hosts.
        return f"wg{side}{os.getpid()}"

    def start(self, lab, side):
        host, device = "host" + side, self.device(side)
        process = lab.start(host, "wireguard-go", "--foreground", device, environment={"LOG_LEVEL": "error"})
        socket = pathlib.Path(f"/var/run/wireguard/{device}.sock")
        lab.until(socket.exists, 10, "wireguard-go", process)
        lab.run(host, "wg", "set", device, "listen-port", 51820, "private-key", lab.folder / ("key" + side),
                "peer", self.public[other(side)], "endpoint", HOST_ADDRESS[other(side)] + ":51820",
                "allowed-ips", "10.1.0.0/24")
        return process


def set_up(forwarder, lab):
    """Sets it up until the guests reach each other; raises Unavailable, with the reason, when that does not work."""
    try:
        forwarder.check()
        forwarder.set_up(lab)
        lab.await_guests()
    except Failure as failure:
        if forwarder.group in (OURS, KERNEL):
            raise
        ended = [tail(process.log) for process in lab.processes if process.poll() is not None]
        raise Unavailable(f"did not start: {failure}" + (f" ({ended[0]})" if ended else "")) from None


ALL = [
    Native(), KernelBridge(), KernelVXLAN(), VnetrForwarder(), OpenVSwitch(), Tinc(), Socat(), VDE(), N2N(), OpenVPN(),
    WireGuardGo(),
]
