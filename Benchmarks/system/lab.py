"""Network namespaces, veths, processes and files of one measurement, and their end, also when it is interrupted.

Two hosts, A and B, are namespaces joined by a cable (a veth), and each has a guest, a namespace too. What carries
frames between the guests is a forwarder (forwarders.py).
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

SIDES = ("A", "B")
GUEST_ADDRESS = {"A": "10.1.0.1", "B": "10.1.0.2"}
HOST_ADDRESS = {"A": "10.99.0.1", "B": "10.99.0.2"}
GUEST_MTU_BYTES = 1500
# What ends by SIGTERM does so within this; then it is killed.
END_SECONDS_MAX = 5


class Unavailable(Exception):
    """A subject cannot run on this machine; the text says why."""


class Failure(Exception):
    """Something that should work did not."""


def other(side):
    return "B" if side == "A" else "A"


class _Interruption:
    """SIGINT and SIGTERM end the program by an exception, but not between making a thing and noting that it is."""

    def __init__(self):
        self.depth = 0
        self.pending = None

    def install(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._arrived)

    def _arrived(self, number, _frame):
        self.pending = number
        if self.depth == 0:
            self._leave()

    def _leave(self):
        number, self.pending = self.pending, None
        raise SystemExit(128 + number)

    @contextlib.contextmanager
    def held(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0 and self.pending is not None:
                self._leave()


interruption = _Interruption()


class Lab:
    """Use as a context manager: what it made is gone afterwards."""

    _made = 0

    def __enter__(self):
        Lab._made += 1
        self.prefix = f"vnetr-bench-{os.getpid()}-{Lab._made}-"
        self.processes = []
        self.namespaces = []
        self.endings = []
        with interruption.held():
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vnetr-bench-"))
        return self

    def __exit__(self, *_):
        with interruption.held():
            for process in self.processes:
                if process.poll() is None:
                    process.terminate()
            deadline = time.monotonic() + END_SECONDS_MAX
            for process in self.processes:
                try:
                    process.wait(max(0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for role in self.namespaces:
                subprocess.run(["ip", "netns", "delete", self.prefix + role], check=False)
            for ending in reversed(self.endings):
                ending()
            shutil.rmtree(self.folder, ignore_errors=True)

    def at_end(self, ending):
        """Has a function called when the processes have ended; the last one first."""
        self.endings.append(ending)

    # --- Namespaces and processes ---

    def namespace(self, role):
        """Makes the namespace of a role: hostA, guestB…"""
        with interruption.held():
            subprocess.run(["ip", "netns", "add", self.prefix + role], check=True)
            self.namespaces.append(role)
        self.ip(role, "link", "set", "lo", "up")
        # No neighbour discovery between the measured packets.
        self.run(role, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")

    def inside(self, role, command):
        return ["ip", "netns", "exec", self.prefix + role, *map(str, command)] if role else [*map(str, command)]

    def start(
            self, role, *command, output=None, errors=None, environment=None, standard_input=subprocess.DEVNULL):
        """Starts a command in the background; it ends with the lab. Its output goes to files of the lab's folder."""
        log = self.folder / (output or f"{len(self.processes)}.log")
        error_log = self.folder / errors if errors else log
        with interruption.held(), open(log, "wb") as stdout, open(error_log, "ab") as stderr:
            process = subprocess.Popen(
                self.inside(role, command), stdin=standard_input, stdout=stdout, stderr=stderr,
                env={**os.environ, **(environment or {})}, process_group=0)
            self.processes.append(process)
        process.log = log
        return process

    def run(self, role, *command, seconds_max=60, output=None, text=None, check=True):
        """Runs a command to its end and returns its standard output; `output` names a file for it instead."""
        with contextlib.ExitStack() as stack:
            stdout = stack.enter_context(open(self.folder / output, "wb")) if output else subprocess.PIPE
            try:
                done = subprocess.run(
                    self.inside(role, command), stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
                    timeout=seconds_max, process_group=0,
                    **({"input": text} if text is not None else {"stdin": subprocess.DEVNULL}))
            except subprocess.TimeoutExpired:
                raise Failure(f"{command[0]} did not end within {seconds_max:.0f} s") from None
        if check and done.returncode != 0:
            what = " ".join(map(str, command[:6]))
            raise Failure(f"`{what}` ended with {done.returncode}: {(done.stderr or done.stdout or '').strip()[-300:]}")
        return done.stdout

    def ip(self, role, *arguments):
        where = ["-n", self.prefix + role] if role else []
        return self.run(None, "ip", *where, *arguments)

    def until(self, condition, seconds_max, what, process=None):
        """Waits until `condition()` holds, at most so long, and not longer than `process` lives."""
        deadline = time.monotonic() + seconds_max
        while not condition():
            if process is not None and process.poll() is not None:
                raise Failure(f"{what}: ended with {process.returncode}: {tail(process.log)}")
            if time.monotonic() > deadline:
                raise Failure(f"{what}: not within {seconds_max} s" + (f": {tail(process.log)}" if process else ""))
            time.sleep(0.02)

    # --- The network ---

    def join_hosts(self, mtu, addresses=True):
        """Two hosts and the cable between them; its devices are called nic."""
        for side in SIDES:
            self.namespace("host" + side)
        self.ip(None, "link", "add", "nic", "netns", self.prefix + "hostA", "mtu", mtu, "type", "veth",
                "peer", "name", "nic", "netns", self.prefix + "hostB", "mtu", mtu)
        for side in SIDES:
            if addresses:
                self.ip("host" + side, "address", "add", HOST_ADDRESS[side] + "/24", "dev", "nic")
            self.ip("host" + side, "link", "set", "nic", "up")

    def guests(self):
        for side in SIDES:
            self.namespace("guest" + side)

    def join_guests(self):
        self.ip(None, "link", "add", "eth0", "netns", self.prefix + "guestA", "type", "veth",
                "peer", "name", "eth0", "netns", self.prefix + "guestB")
        for side in SIDES:
            self.guest_up(side)

    def plug_veth(self, side):
        """A veth from the guest's eth0 to the host's vm1."""
        self.ip(None, "link", "add", "vm1", "netns", self.prefix + "host" + side, "mtu", GUEST_MTU_BYTES,
                "type", "veth", "peer", "name", "eth0", "netns", self.prefix + "guest" + side)
        self.ip("host" + side, "link", "set", "vm1", "up")
        self.guest_up(side)

    def plug_device(self, side, device, maker=None):
        """Gives a device that a forwarder, the process `maker`, made on the host to the guest, as its eth0."""
        self.until(lambda: self.has_device("host" + side, device), 10, f"the device {device}", maker)
        self.ip("host" + side, "link", "set", device, "down")
        self.ip("host" + side, "link", "set", device, "netns", self.prefix + "guest" + side)
        if device != "eth0":
            self.ip("guest" + side, "link", "set", device, "name", "eth0")
        self.guest_up(side)

    def has_device(self, role, device):
        return bool(self.run(None, "ip", "-n", self.prefix + role, "-o", "link", "show", "dev", device, check=False))

    def guest_up(self, side):
        role = "guest" + side
        self.ip(role, "address", "replace", GUEST_ADDRESS[side] + "/24", "dev", "eth0")
        self.ip(role, "link", "set", "eth0", "mtu", GUEST_MTU_BYTES, "up")

    def shape(self, role, device, rate="1gbit"):
        # A burst that lets a train of 64 KiB through whole: with a smaller one the kernel cuts it up.
        self.run(role, "tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "128kb",
                 "latency", "10ms")

    def unshape(self, role, device):
        self.run(role, "tc", "qdisc", "delete", "dev", device, "root")

    def await_guests(self):
        """Until guest A reaches guest B, as switches and keys may need their time."""
        def is_answered():
            return "1 received" in self.run("guestA", "ping", "-c", 1, "-W", 1, "-q", GUEST_ADDRESS["B"], check=False)

        self.until(is_answered, 20, "the guests do not reach each other")


def tail(path, characters=200):
    """The end of a log as one line."""
    text = " ".join(path.read_text(errors="replace").split())
    return text if len(text) <= characters else "…" + text[-characters:]


class BusyClock:
    """The CPU seconds that the whole machine was busy since the last `seconds()`, from /proc/stat."""

    def __init__(self):
        self.ticks = os.sysconf("SC_CLK_TCK")
        self.last = self._busy()

    def _busy(self):
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, interrupts, soft_interrupts = map(int, file.readline().split()[1:8])
        return user + nice + system + interrupts + soft_interrupts

    def seconds(self):
        now = self._busy()
        passed, self.last = now - self.last, now
        return passed / self.ticks


class OthersClock:
    """The CPU seconds that others took since the last `seconds()`: programs that are not of this run, by
    /proc/PID/stat, and other virtual machines, by what /proc/stat calls steal.

    Kernel threads do not count, as they work for the run; a short-lived program counts once its parent took note of
    its end.
    """

    def __init__(self):
        self.ticks = os.sysconf("SC_CLK_TCK")
        self.programs = self._programs()
        self.steal = self._steal()

    def _steal(self):
        with open("/proc/stat", encoding="ascii") as file:
            return int(file.readline().split()[8])

    def _programs(self):
        parents, taken = {}, {}
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(name)] = int(fields[1])
            # User and system time of it, and of its children that ended.
            taken[int(name)] = sum(map(int, fields[11:15]))
        return {process: ticks for process, ticks in taken.items() if not _descends(process, parents)}

    def seconds(self):
        """(programs, other machines)"""
        programs, steal = self._programs(), self._steal()
        by_programs = sum(max(0, ticks - self.programs.get(process, 0)) for process, ticks in programs.items())
        by_machines = steal - self.steal
        self.programs, self.steal = programs, steal
        return by_programs / self.ticks, by_machines / self.ticks


def _descends(process, parents):
    """Whether a process is this one, one that it started, or one of the kernel's."""
    kernel = 2
    while process:
        if process in (os.getpid(), kernel):
            return True
        process = parents.get(process, 0)
    return False
