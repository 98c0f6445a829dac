"""What is measured from guest A to guest B: one function per measurement, each returns figures by key."""

import json
import re
import statistics

from lab import GUEST_ADDRESS, BusyClock, Failure

# A UDP payload of 18 bytes makes an Ethernet frame of 64: header 14, IPv4 20, UDP 8, frame check sequence 4.
PAYLOAD_BYTES_OF_64_BYTE_FRAME = 18
UDP_PAYLOAD_BYTES = 1400
LOSS_PERCENT_MAX = 0.5
# Of this search alone: with the default of 208 KiB a receiver that is not scheduled for some milliseconds loses at any
# rate, and the search would measure that.
SEARCH_SOCKET_BUFFER_BYTES_MAX = 4 << 20
# A rate counts as lossless where one of so many tries is: one hiccup of the machine does not end the search.
SEARCH_TRIES = 2
# Halvings, on a logarithmic scale, of the range from a 64th of what the sender can do up to that: to within 2 %.
RATE_RANGE = 64
RATE_STEPS = 8
# What a smoke run sends in place of running for seconds.
SMOKE_TRANSFER = "1M"
# The TCP payload and the Ethernet frame of a full segment at an MTU of 1500: IPv4 20, TCP 20, its timestamps 12.
SEGMENT_PAYLOAD_BYTES = 1448
SEGMENT_FRAME_BYTES = 1514
SHAPED_BITS_PER_SECOND = 1e9


class Effort:
    """How long and how often: `smoke` only sees that figures come out."""

    def __init__(self, seconds, smoke=False):
        self.seconds = seconds
        self.smoke = smoke
        self.round_trips = 200 if smoke else 5000 * seconds

    def iperf_options(self):
        return ["--bytes", SMOKE_TRANSFER] if self.smoke else ["--time", self.seconds]

    def seconds_max(self):
        return self.seconds * 3 + 20


def round_trip(lab, effort, interval_seconds=0):
    """`ping -i 0`: a flood (the next request as soon as the reply is there) that prints the time of each reply, in
    whole microseconds where it is below a millisecond. With an interval fewer of them, as many as fit."""
    count = round(effort.seconds / interval_seconds) if interval_seconds else effort.round_trips
    lab.run("guestA", "ping", "-i", interval_seconds, "-c", count, GUEST_ADDRESS["B"], output="ping", check=False,
            seconds_max=count * (interval_seconds + 0.011) + 20)
    times = [float(time) * 1000 for time in re.findall(r"time=([\d.]+) ms", (lab.folder / "ping").read_text())]
    if len(times) < count * 0.9:
        raise Failure(f"only {len(times)} of {count} pings were answered")
    percentiles = statistics.quantiles(times, n=100, method="inclusive")
    return {"rtt_avg_us": statistics.fmean(times), "rtt_p50_us": percentiles[49], "rtt_p99_us": percentiles[98]}


def iperf(lab, effort, *options):
    """One run of iperf3 from guest A to guest B; its report."""
    for last_try in (False, True):
        server = lab.start("guestB", "iperf3", "--server", "--one-off", "--forceflush")
        try:
            lab.until(lambda: b"listening" in server.log.read_bytes(), 10, "the iperf3 server", server)
            text = lab.run(
                "guestA", "iperf3", "--client", GUEST_ADDRESS["B"], "--json", *effort.iperf_options(), *options,
                seconds_max=effort.seconds_max(), check=False)
            report = json.loads(text)
            if "error" in report:
                raise Failure(f"iperf3: {report['error']}")
            return report["end"]
        except (Failure, json.JSONDecodeError) as failure:
            # Its control connection goes through the same tunnel and may starve beside an unthrottled flow: once more.
            if last_try:
                raise Failure(f"iperf3 {' '.join(map(str, options))}: {failure}") from None
        finally:
            if server.poll() is None:
                server.terminate()
            server.wait()
            lab.processes.remove(server)
    raise AssertionError


def tcp(lab, effort, flows=1, window=None):
    """Gb/s that arrived, and the CPU seconds that the whole machine was busy for each GB of it."""
    options = ["--parallel", flows] if flows > 1 else []
    if window:
        options += ["--window", window]
    clock = BusyClock()
    received = iperf(lab, effort, *options)["sum_received"]
    busy = clock.seconds()
    return received["bits_per_second"] / 1e9, busy / (received["bytes"] / 1e9)


def udp(lab, effort, payload_bytes, bits_per_second=0, *options):
    """What was offered and what arrived: Gb/s of payload, datagrams a second, and the share that was lost."""
    end = iperf(lab, effort, "--udp", "--length", payload_bytes, "--bitrate", round(bits_per_second), *options)
    received, sent = end["sum_received"], end["sum_sent"]
    # By gaps in the sequence: what is still on its way at the end is not lost.
    lost_percent = received["lost_percent"] if received["bytes"] else 100
    return {
        "offered": sent["bits_per_second"],
        "delivered": received["bits_per_second"],
        "datagrams_per_second": received["bytes"] / payload_bytes / received["seconds"],
        "lost_percent": lost_percent,
    }


def udp_lossless(lab, effort):
    """The highest rate offered of which at most half a percent is lost, in bit/s; None where none was found."""
    with open("/proc/sys/net/core/rmem_max", encoding="ascii") as file:
        buffer = ("--window", min(SEARCH_SOCKET_BUFFER_BYTES_MAX, int(file.read())))

    def attempt(rate, step):
        for _ in range(1 if effort.smoke else SEARCH_TRIES):
            result = udp(lab, step, UDP_PAYLOAD_BYTES, rate, *buffer)
            if result["lost_percent"] <= LOSS_PERCENT_MAX:
                return result["offered"], True
        return result["offered"], False

    high, lossless = attempt(0, effort)
    if lossless:
        return high
    low, best = high / RATE_RANGE, None
    for _ in range(1 if effort.smoke else RATE_STEPS):
        middle = (low * high) ** 0.5
        offered, lossless = attempt(middle, Effort(1, effort.smoke))
        if lossless:
            low = middle
            best = max(best or 0, offered)
        else:
            high = middle
    return best


def shaped_share(lab, effort, forwarder):
    """TCP through an underlay of 1 Gb/s, as a share of what headers leave of it."""
    devices = forwarder.underlay_devices()
    for role, device in devices:
        lab.shape(role, device)
    gbps, _ = tcp(lab, effort)
    for role, device in devices:
        lab.unshape(role, device)
    return gbps * 1e9 / goodput_max(forwarder.added_bytes)


def goodput_max(added_bytes):
    return SHAPED_BITS_PER_SECOND * SEGMENT_PAYLOAD_BYTES / (SEGMENT_FRAME_BYTES + added_bytes)
