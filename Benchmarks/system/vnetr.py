"""A vnetr that runs on a host of the lab: its configuration, its counters, its cost."""

import json
import os
import signal
import time

from lab import GUEST_MTU_BYTES, HOST_ADDRESS, Failure, other, tail

READY_SECONDS_MAX = 60
# Set by main.py.
binary = None


class Vnetr:
    """One forwarder process on the host of a side."""

    def __init__(self, lab, side, configuration, flags=(), role=""):
        """`role`: the namespace that it runs in; the side's host unless given, None: outside of all."""
        self.lab = lab
        self.side = side
        # The hosts are one machine with one name; of the node's name a TAP device's MAC address is made.
        file = lab.folder / f"host{side}.toml"
        file.write_text(f'[node]\nname = "host-{side}"\n' + configuration)
        self.output = lab.folder / f"counters{side}"
        self.errors = lab.folder / f"log{side}"
        started = time.monotonic()
        self.process = lab.start(
            "host" + side if role == "" else role, binary, "run", "--config", file, "--counters-format", "json", *flags,
            output=self.output.name, errors=self.errors.name)
        self.process.log = self.errors
        lab.until(self._is_ready, READY_SECONDS_MAX, f"vnetr on host {side}", self.process)
        self.start_seconds = time.monotonic() - started

    def _is_ready(self):
        return " ready" in self.errors.read_text(errors="replace")

    def counters(self):
        """What SIGUSR1 prints, as a dictionary."""
        before = self.output.read_text().count("\n}\n")
        self.process.send_signal(signal.SIGUSR1)
        self.lab.until(
            lambda: self.output.read_text().count("\n}\n") > before, 20, "the counters of vnetr", self.process)
        return self._last_report()

    def _last_report(self):
        text, decoder, position, last = self.output.read_text(), json.JSONDecoder(), 0, None
        while position < len(text):
            last, position = decoder.raw_decode(text, position)
            while position < len(text) and text[position].isspace():
                position += 1
        if last is None:
            raise Failure("vnetr printed no counters")
        return last

    def work(self):
        """Since its start: frames that came in, as they are on the wire and with a train or a super-frame as one, calls
        into the kernel, CPU seconds of all its threads."""
        report = self.counters()
        cpu = 0
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            with open(f"/proc/{self.process.pid}/task/{task}/schedstat", encoding="ascii") as file:
                cpu += int(file.read().split()[0])
        return {
            "frames": sum(port["in_frames"] for port in report["ports"].values())
            + sum(link["in_frames"] for link in report["links"].values()),
            "receives": sum(worker["receives"] for worker in report["workers"].values()),
            "enters": sum(worker["enters"] for worker in report["workers"].values()),
            "cpu_seconds": cpu / 1e9,
        }

    def resident_bytes(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        raise Failure("no VmRSS")

    def log(self):
        return self.errors.read_text(errors="replace")

    def stop(self):
        """Ends it, and checks that every frame is accounted for."""
        self.process.terminate()
        status = self.process.wait(30)
        if status != 0 or not self._last_report()["conservation"]["holds"]:
            raise Failure(f"vnetr on host {self.side} ended with {status}: {tail(self.errors)}")


def domain(name="blue", vni=42, **keys):
    return section("[domain]", name=name, vni=vni, **keys)


def port(name, kind="tap", **keys):
    return section("[port]", name=name, kind=kind, **keys)


def link(name, remote, **keys):
    return section("[link]", name=name, remote=remote, **keys)


def route(**keys):
    return section("[route]", **keys)


def underlay(side):
    return section("underlay", address=HOST_ADDRESS[side])


def section(title, **keys):
    # JSON's strings, numbers, booleans and arrays are TOML's too.
    return f"[{title}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())


def guest_port(**keys):
    return port("vm1", domain="blue", mtu=GUEST_MTU_BYTES, **keys)


def encapsulating(side, encapsulation="vxlan"):
    """One domain, one TAP, and one link to the other host."""
    remote = HOST_ADDRESS[other(side)]
    return domain() + guest_port() + underlay(side) + link("peer", remote, encapsulation=encapsulation)


def passthrough(_side):
    return port("vm1") + port("nic", "packet") + section("[passthrough]", a="vm1", b="nic")


def direct_bridge(_side):
    return domain() + guest_port() + port("nic", "packet", domain="blue")
