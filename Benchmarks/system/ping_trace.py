"""Where the microseconds of one ping through both hosts go: the kernel's tracer follows each of many pings.

A ping is told from the others by its order alone: one is under way at a time. It counts when exactly the frames that
belong to one were seen, each of its length; others (two under way, a frame lost) are left out.
"""

import collections
import os
import statistics

import forwarders
import measures
from lab import Failure, Unavailable
from results import measure, number
from tracefs import Event, Tracer, Wanted

NAME = "trace"
TITLE = "Where the microseconds of a ping go"
REFERENCES = ()
# In an idle system a ping finds everybody asleep. With less than 10 ms ping itself never sleeps,
# as its timeouts are not so exact.
IDLE_INTERVAL_SECONDS = 0.02

# System calls by their numbers (Linux: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
Calls = collections.namedtuple("Calls", "send receive yield_cpu enter")
CALLS = {"x86_64": Calls(44, 47, 24, 426), "aarch64": Calls(206, 212, 124, 426)}

# ICMP echo with ping's 56 bytes: Ethernet 14, IPv4 20, ICMP 8.
ECHO_FRAME_BYTES = 98
ETHERNET_HEADER_BYTES = 14
# A thread that runs when nothing does: the CPU is halted.
IDLE_THREAD = 0

# Who works while a stage lasts.
KERNEL_WORK, OUR_WORK, NOTICE, PING = "the kernel's network code", "vnetr in user space", "until vnetr notices", \
    "until ping is awake"
KINDS = (KERNEL_WORK, OUR_WORK, NOTICE, PING)
# A stage ends at a milestone and begins at that of the stage before. `segment` is the part of the way that any
# forwarder has.
Stage = collections.namedtuple("Stage", "key title kind segment")
SEGMENTS = {
    "guest_a": "guest A: the request through its stack",
    "host_a_out": "host A",
    "underlay_out": "underlay, to host B",
    "host_b_in": "host B",
    "guest_b": "guest B: the answer",
    "host_b_out": "host B, back",
    "underlay_in": "underlay, to host A",
    "host_a_in": "host A, back",
    "ping": "guest A: until ping has the answer",
}
STAGES = [
    Stage("guest_a", "guest A: ping's send, through its stack to the TAP", KERNEL_WORK, "guest_a"),
    Stage("host_a_out_notice", "host A: until the worker notices", NOTICE, "host_a_out"),
    Stage("host_a_out_work", "host A: read, route, encapsulate", OUR_WORK, "host_a_out"),
    Stage("host_a_out_send", "host A: the kernel sends UDP", KERNEL_WORK, "host_a_out"),
    Stage("underlay_out", "underlay: veth to host B", KERNEL_WORK, "underlay_out"),
    Stage("host_b_in_notice", "host B: UDP receive, until the worker notices", NOTICE, "host_b_in"),
    Stage("host_b_in_work", "host B: decapsulate, route", OUR_WORK, "host_b_in"),
    Stage("host_b_in_write", "host B: the kernel writes to the TAP", KERNEL_WORK, "host_b_in"),
    Stage("guest_b", "guest B: its stack answers", KERNEL_WORK, "guest_b"),
    Stage("host_b_out_notice", "host B: until the worker notices", NOTICE, "host_b_out"),
    Stage("host_b_out_work", "host B: read, route, encapsulate", OUR_WORK, "host_b_out"),
    Stage("host_b_out_send", "host B: the kernel sends UDP", KERNEL_WORK, "host_b_out"),
    Stage("underlay_in", "underlay: veth to host A", KERNEL_WORK, "underlay_in"),
    Stage("host_a_in_notice", "host A: UDP receive, until the worker notices", NOTICE, "host_a_in"),
    Stage("host_a_in_work", "host A: decapsulate, route", OUR_WORK, "host_a_in"),
    Stage("host_a_in_write", "host A: the kernel writes to the TAP", KERNEL_WORK, "host_a_in"),
    Stage("ping", "guest A: until ping has the answer", PING, "ping"),
]
WAITS = [stage for stage in STAGES if stage.kind in (NOTICE, PING)]
# Sums of stages: what ping prints ends where its kernel stamps the answer; ping itself has it later.
ROUND_TRIP, WHOLE = "round_trip", "whole"
TOGETHER = {ROUND_TRIP: "together: what ping sees", WHOLE: "together, and until ping has it"}
PING_STAGE = "ping"

# How a wait ended, from the cheapest on.
RUNNING, REGAINED, WOKEN, HALTED = "running", "regained", "woken", "halted"
ENDINGS = {
    RUNNING: "it was running", REGAINED: "it got its CPU back", WOKEN: "it was woken, its CPU was in use",
    HALTED: "it was woken, its CPU was halted",
}
# Pings by what their two workers went through.
ALL, AWAKE = "all", "awake"
GROUPS = {ALL: "all pings", AWAKE: "no worker slept", WOKEN: "a worker slept, CPU in use",
          HALTED: "a worker slept, CPU halted"}
# Of each round so many pings, the slowest, do not count in the means: a virtual machine that is stopped for
# milliseconds would be all that idle pings show.
SLOWEST_SHARE = 0.1
WHATS = ("mean", "mean_all", "median", "p99")

COUNTS = ("enters", "yields", "switches", "wakes", "halted_wakes")
MEASURES = [
    measure("rtt_avg_us", "RTT average, not traced", "µs", 1, "lower"),
    measure("rtt_p50_us", "RTT median, not traced", "µs", 1, "lower"),
    measure("traced_rtt_p50_us", "RTT median, traced", "µs", 1, "lower"),
    measure("enters", "io_uring_enter a ping", "", 2, "lower"),
    measure("yields", "sched_yield a ping", "", 1, "lower"),
    measure("switches", "context switches a ping", "", 2, "lower"),
    measure("wakes", "wake-ups a ping", "", 2, "lower"),
    measure("halted_wakes", "wake-ups of a halted CPU a ping", "", 2, "lower"),
]
HOW = [
    "Two hosts and a guest on each are network namespaces of this machine; TAP and VXLAN, default settings; guests' MTU"
    " 1500, underlay's 1600. The kernel's VXLAN beside it on the same network.",
    f"Flood: `ping -i 0`. Idle: `ping -i {IDLE_INTERVAL_SECONDS}`, which finds everybody asleep. Each once without the"
    " tracer and once with it. RTTs are what ping prints: until the guest's kernel has the answer; ping itself runs"
    " later, and that is a stage of its own.",
    "Traced by the kernel (tracefs, nanoseconds): system calls, the scheduler's switches and wake-ups, frames that"
    " leave and enter devices. The buffers keep the newest pings of each run.",
    f"Means are over the pings of all rounds that could be followed, but of each round the slowest {SLOWEST_SHARE:.0%},"
    " and stages add up; where it says so they are over all. Medians and 99th percentiles are those of all pings of a"
    " round, and of these the median.",
    "The worker notices: the first return of io_uring_enter after which it has the frame. Calls counted are"
    " those of both workers, switches and wake-ups those of both and of ping, from one request to the next.",
]


def figure(*parts):
    return ".".join(parts)


# Of a short run, or on another machine, not every way to wait comes up.
MAY_BE_MISSING = {
    figure(group, span, what) for group in GROUPS if group != ALL
    for span in [*(stage.key for stage in STAGES), ROUND_TRIP, WHOLE] for what in WHATS
} | {figure("wait", stage.key, ending, "mean") for stage in WAITS for ending in ENDINGS}


class Ours(forwarders.VnetrForwarder):
    is_ours = True

    def __init__(self, key, title, interval_seconds):
        super().__init__(key, title)
        self.interval_seconds = interval_seconds


class Kernel(forwarders.KernelVXLAN):
    is_ours = False

    def __init__(self, key, title, interval_seconds):
        self.key, self.title, self.interval_seconds = key, title, interval_seconds


KERNEL_FLOOD, KERNEL_IDLE = "vxlan", "vxlan_idle"
OURS_FLOOD, OURS_IDLE = "vnetr", "vnetr_idle"
SUBJECTS = [
    Kernel(KERNEL_FLOOD, "kernel VXLAN, flood", 0), Ours(OURS_FLOOD, "vnetr, flood", 0),
    Kernel(KERNEL_IDLE, "kernel VXLAN, idle", IDLE_INTERVAL_SECONDS),
    Ours(OURS_IDLE, "vnetr, idle", IDLE_INTERVAL_SECONDS),
]
SMOKE = tuple(each.key for each in SUBJECTS)


def subjects():
    return SUBJECTS


# --- Following pings ---


class Ping:
    """Of one ping: nanoseconds by stage, how each wait ended, and counts."""

    def __init__(self, stages, endings, counts):
        self.stages, self.endings, self.counts = stages, endings, counts
        workers = {ending for stage, ending in endings.items() if stage != PING_STAGE}
        self.group = HALTED if HALTED in workers else WOKEN if WOKEN in workers else AWAKE

    def nanoseconds(self, what):
        if what == WHOLE:
            return sum(self.stages.values())
        if what == ROUND_TRIP:
            return sum(self.stages.values()) - self.stages[PING_STAGE]
        return self.stages[what]


def traced_events():
    calls = CALLS[os.uname().machine]
    ids = " || ".join(f"id == {call}" for call in calls)
    devices = 'name == "eth0" || name == "nic"'
    return {
        "sched/sched_switch": Wanted(("prev_pid", "next_pid"), ""),
        "sched/sched_waking": Wanted(("pid",), ""),
        "net/net_dev_start_xmit": Wanted(("name", "len"), devices),
        "net/netif_receive_skb": Wanted(("name", "len"), devices),
        "raw_syscalls/sys_enter": Wanted(("id",), ids),
        "raw_syscalls/sys_exit": Wanted(("id", "ret"), ids),
    }


def frames_of_a_ping(added_bytes):
    """(event, device, length) in their order. What a device sends has an Ethernet header, what it received no more."""
    def there(device, length):
        return ("net_dev_start_xmit", device, length), ("netif_receive_skb", device, length - ETHERNET_HEADER_BYTES)

    leaves_guest, enters_guest = there("eth0", ECHO_FRAME_BYTES)
    underlay = there("nic", ECHO_FRAME_BYTES + added_bytes)
    return [leaves_guest, *underlay, enters_guest] * 2


def with_switches_from_idle(events):
    """Of some CPUs the kernel does not trace how the idle thread is left: then another runs without having come."""
    whole, running = [], {}
    for event in events:
        if running.get(event.cpu) == IDLE_THREAD != event.thread:
            running[event.cpu] = event.thread
            whole.append(Event(event.time, event.cpu, "sched_switch", IDLE_THREAD, [IDLE_THREAD, event.thread]))
        if event.kind == "sched_switch":
            running[event.cpu] = event.values[1]
        whole.append(event)
    return whole


class Follower:
    """Follows the pings in a list of events."""

    def __init__(self, events, frames, is_ours):
        self.events, self.frames, self.is_ours = with_switches_from_idle(events), frames, is_ours
        self.calls = CALLS[os.uname().machine]

    def pings(self):
        """(those that could be followed, how many there were)"""
        starts = list(self._starts())
        # The last one may lack its end.
        found = (self._ping(start, end) for start, end in zip(starts, starts[1:]))
        return [ping for ping in found if ping], max(0, len(starts) - 1)

    def _starts(self):
        """Where ping calls send, as far as a frame leaves the guest before it returns."""
        sending = {}
        request = self.frames[0]
        for place, event in enumerate(self.events):
            if event.kind == "sys_enter" and event.values[0] == self.calls.send:
                sending[event.thread] = place
            elif event.kind == "net_dev_start_xmit" and event.thread in sending and self._frame(event) == request:
                yield sending.pop(event.thread)
            elif event.kind == "sys_exit":
                sending.pop(event.thread, None)

    def _frame(self, event):
        return event.kind, *event.values

    def _ping(self, start, end):
        """The ping between two sends, None where it cannot be followed."""
        wanted = set(self.frames)
        places = [place for place in range(start, end) if self._frame(self.events[place]) in wanted]
        if [self._frame(self.events[place]) for place in places] != self.frames:
            return None
        ping = self.events[start].thread
        received = self._find(places[-1], end, 1, "sys_exit", ping, self.calls.receive)
        if received is None or self.events[received].values[1] <= 0:
            return None
        threads, milestones = [], []
        for number_of_frame, place in enumerate(places):
            # What vnetr sends or writes, it does from a call that follows the one by which it noticed.
            if self.is_ours and number_of_frame in (1, 3, 5, 7):
                thread = self.events[place].thread
                entered = self._find(place, start, -1, "sys_enter", thread, self.calls.enter)
                noticed = None if entered is None else self._find(
                    entered, start, -1, "sys_exit", thread, self.calls.enter)
                if noticed is None:
                    return None
                milestones += [noticed, entered]
                threads.append(thread)
            milestones.append(place)
        milestones.append(received)
        times = [self.events[place].time for place in [start, *milestones]]
        spans = [after - before for before, after in zip(times, times[1:])]
        # The worker of each host has two of the four.
        if min(spans) < 0 or threads[:2] != threads[3:1:-1]:
            return None
        keys = [stage.key for stage in STAGES] if self.is_ours else list(SEGMENTS)
        endings, before = {}, start
        waiting = {stage.key: thread for stage, thread in zip(WAITS, [*threads, ping] if self.is_ours else [])}
        waiting[PING_STAGE] = ping
        for key, place in zip(keys, milestones):
            if key in waiting:
                endings[key] = self._ending(before, place, waiting[key])
            before = place
        return Ping(dict(zip(keys, spans)), endings, self._counts(start, end, set(threads), ping))

    def _find(self, place, bound, step, kind, thread, call):
        """The next such event from `place` on, forward or back."""
        for other in range(place + step, bound, step):
            event = self.events[other]
            if event.thread == thread and event.kind == kind and event.values[0] == call:
                return other
        return None

    def _ending(self, begin, end, thread):
        woken = False
        for event in self.events[begin + 1:end]:
            if event.kind == "sched_waking" and event.values[0] == thread:
                woken = True
            elif event.kind == "sched_switch" and event.values[1] == thread:
                if not woken:
                    return REGAINED
                return HALTED if event.values[0] == IDLE_THREAD else WOKEN
        return WOKEN if woken else RUNNING

    def _counts(self, begin, end, workers, ping):
        threads = {ping, *workers}
        counts = dict.fromkeys(COUNTS, 0)
        for event in self.events[begin:end]:
            if event.kind == "sys_enter" and event.thread in workers:
                counts["enters"] += event.values[0] == self.calls.enter
                counts["yields"] += event.values[0] == self.calls.yield_cpu
            elif event.kind == "sched_switch" and not threads.isdisjoint(event.values):
                counts["switches"] += 1
                counts["halted_wakes"] += event.values[0] == IDLE_THREAD
            elif event.kind == "sched_waking" and event.values[0] in threads:
                counts["wakes"] += 1
        return counts


# --- Figures ---


def work(effort):
    machine = os.uname().machine
    if machine not in CALLS:
        raise Unavailable(f"the numbers of {machine}'s system calls are not known here")
    # That it is found out before anything is set up.
    with Tracer(traced_events()):
        pass

    def measured(forwarder, lab, turn):
        turn.take(("rtt_avg_us", "rtt_p50_us"), round_trip, lab, effort, forwarder)
        turn.take(keys(forwarder), trace, lab, effort, forwarder)
    return measured


def round_trip(lab, effort, forwarder):
    return measures.round_trip(lab, effort, forwarder.interval_seconds)


def groups(forwarder):
    return GROUPS if forwarder.is_ours else (ALL,)


def spans(forwarder):
    return [*((stage.key for stage in STAGES) if forwarder.is_ours else SEGMENTS), ROUND_TRIP, WHOLE]


def waits(forwarder):
    return WAITS if forwarder.is_ours else ()


def keys(forwarder):
    """Of all figures that `trace` returns."""
    return [
        "traced_rtt_p50_us", "pings", "followed", *COUNTS,
        *(figure(group, "pings") for group in groups(forwarder)),
        *(figure(group, span, what) for group in groups(forwarder) for span in spans(forwarder)
          for what in WHATS),
        *(figure("wait", stage.key, ending, what) for stage in waits(forwarder) for ending in ENDINGS
          for what in ("pings", "mean")),
    ]


def trace(lab, effort, forwarder):
    with Tracer(traced_events()) as tracer:
        tracer.start()
        traced_rtt = round_trip(lab, effort, forwarder)["rtt_p50_us"]
        events = tracer.events()
    pings, seen = Follower(events, frames_of_a_ping(forwarder.added_bytes), forwarder.is_ours).pings()
    if not pings:
        raise Failure(f"of {seen} pings in the trace none could be followed")
    figures = {"traced_rtt_p50_us": traced_rtt, "pings": seen, "followed": len(pings)}
    for key in COUNTS:
        figures[key] = statistics.fmean(ping.counts[key] for ping in pings)
    pings.sort(key=lambda ping: ping.nanoseconds(WHOLE))
    counted = pings[:max(1, round(len(pings) * (1 - SLOWEST_SHARE)))]
    for group in groups(forwarder):
        all_of_it, mine = ([ping for ping in some if group in (ALL, ping.group)] for some in (pings, counted))
        figures[figure(group, "pings")] = len(mine)
        for span in spans(forwarder):
            figures.update(distribution(figure(group, span), *(
                [ping.nanoseconds(span) / 1000 for ping in some] for some in (mine, all_of_it))))
    for stage in waits(forwarder):
        for ending in ENDINGS:
            times = [ping.stages[stage.key] / 1000 for ping in counted if ping.endings[stage.key] == ending]
            figures[figure("wait", stage.key, ending, "pings")] = len(times)
            figures[figure("wait", stage.key, ending, "mean")] = statistics.fmean(times) if times else None
    return figures


def distribution(name, counted, values):
    if not counted:
        return {figure(name, what): None for what in WHATS}
    percentiles = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    figures = (statistics.fmean(counted), statistics.fmean(values), percentiles[49], percentiles[98])
    return {figure(name, what): value for what, value in zip(WHATS, figures)}


# --- Tables ---


class Reader:
    """Reads the figures of one subject: counts added, means weighted by how many pings each round has."""

    def __init__(self, result, subject):
        self.result, self.subject = result, subject
        self.title = next((each["title"] for each in result.subjects if each["key"] == subject), subject)
        self.values = result.document["values"].get(subject, {})

    def is_there(self):
        return self.count(ALL, "pings") > 0

    def count(self, *parts):
        return sum(value or 0 for value in self.values.get(figure(*parts), []))

    def mean(self, *parts):
        counts = self.values.get(figure(*(parts if parts[0] == "wait" else parts[:1]), "pings"), [])
        means = self.values.get(figure(*parts, "mean"), [])
        pairs = [(count, mean) for count, mean in zip(counts, means) if count and mean is not None]
        return sum(count * mean for count, mean in pairs) / sum(count for count, _ in pairs) if pairs else None

    def median(self, *parts):
        return self.result.median(self.subject, figure(*parts))

    def segment(self, segment):
        """The mean of a part of the way that any forwarder has."""
        if figure(ALL, STAGES[1].key, "mean") not in self.values:
            return self.mean(ALL, segment)
        return sum(self.mean(ALL, stage.key) for stage in STAGES if stage.segment == segment)


def share(part, whole):
    return "-" if part is None or not whole else f"{part / whole:.1%}"


def stages_table(reader):
    whole = reader.mean(ALL, WHOLE)
    titles = [(stage.key, stage.title) for stage in STAGES]
    # The sum that ping prints stands before the stage that it does not count.
    titles.insert(len(titles) - 1, (ROUND_TRIP, TOGETHER[ROUND_TRIP]))
    titles.append((WHOLE, TOGETHER[WHOLE]))
    rows = [[title, number(reader.mean(ALL, key), 2), share(reader.mean(ALL, key), whole),
             *(number(reader.median(ALL, key, what), 2) for what in WHATS[1:])] for key, title in titles]
    pings, followed = reader.count("pings"), reader.count("followed")
    return {
        "title": f"Stages of a ping: {reader.title}",
        "columns": ["", "mean, µs", "share", "mean of all", "median", "99th percentile"], "rows": rows,
        "notes": [f"{followed:,} of {pings:,} pings in the trace were followed."] + cost(reader),
    }


def cost(reader):
    off, on = reader.median("rtt_p50_us"), reader.median("traced_rtt_p50_us")
    if not off or not on:
        return []
    return [f"What the tracer itself costs, {reader.title}: ping's median is {on:.1f} µs with it and {off:.1f} µs"
            f" without, {on / off:.2f} times as much."]


def views(readers):
    """(title, reader, group): the ways to look at pings for which there are any."""
    found = []
    for reader in readers:
        found.append((reader.title, reader, ALL))
        parts = [(f"{reader.title}: {GROUPS[group]}", reader, group) for group in GROUPS
                 if group != ALL and reader.count(group, "pings")]
        found += parts if len(parts) > 1 else []
    return found


def kinds_table(readers):
    shown = views(readers)
    rows = []
    for kind in KINDS:
        stages = [stage.key for stage in STAGES if stage.kind == kind]
        rows.append([kind if kind != PING else f"beside it: {kind}", *(
            share(sum(reader.mean(group, stage) for stage in stages), reader.mean(group, ROUND_TRIP))
            for _, reader, group in shown)])
    return {"title": "By who works, share of what ping sees", "columns": ["", *(title for title, *_ in shown)],
            "rows": rows}


def groups_table(readers):
    shown = views(readers)
    rows = [["share of pings", *(share(reader.count(group, "pings"), reader.count(ALL, "pings"))
                                 for _, reader, group in shown)]]
    for key, title in [*((stage.key, stage.title) for stage in STAGES), *TOGETHER.items()]:
        rows.append([title, *(number(reader.mean(group, key), 2) for _, reader, group in shown)])
        for what, name in (("median", "median"), ("p99", "99th percentile")) if key in TOGETHER else ():
            rows.append([f"{title}: {name}", *(number(reader.median(group, key, what), 2)
                                               for _, reader, group in shown)])
    return {"title": "By whether a worker slept, mean µs", "columns": ["", *(title for title, *_ in shown)],
            "rows": rows}


def waits_table(reader):
    everything = reader.count(ALL, "pings")
    rows = []
    for stage in WAITS:
        cells = [stage.title]
        for ending in ENDINGS:
            cells += [share(reader.count("wait", stage.key, ending, "pings"), everything),
                      number(reader.mean("wait", stage.key, ending), 2)]
        rows.append(cells)
    return {
        "title": f"How each wait ended: {reader.title}",
        "columns": ["", *(cell for title in ENDINGS.values() for cell in (title, "mean, µs"))], "rows": rows,
        "notes": ["Shares are of pings. Who is running finds the frame by itself; who got its CPU back was ready to"
                  " run and shares the CPU, as workers do that yield; who was woken slept in the kernel."],
    }


def segments_table(pairs):
    def row(title, figure_of, digits=2):
        cells = [title]
        for ours, kernel in pairs:
            mine, theirs = figure_of(ours), figure_of(kernel)
            cells += [number(mine, digits), number(theirs, digits), number(mine / theirs, 1)]
        return cells

    rows = [row(title, lambda reader, segment=segment: reader.segment(segment)) for segment, title in SEGMENTS.items()]
    rows += [row(title, lambda reader, key=key: reader.mean(ALL, key)) for key, title in TOGETHER.items()]
    rows.append(row("ping's median, not traced", lambda reader: reader.median("rtt_p50_us")))
    return {
        "title": "Beside the kernel's VXLAN, mean µs", "rows": rows,
        "columns": ["", *(cell for ours, kernel in pairs for cell in (ours.title, kernel.title, "ratio"))],
        "notes": ["The kernel's VXLAN passes each frame on in the call that brought it: nobody has to notice it, and"
                  " nobody wakes but ping.", *(line for _, kernel in pairs for line in cost(kernel))],
    }


def readers_there(result, *names):
    return [reader for reader in (Reader(result, name) for name in names) if reader.is_there()]


def tables(result):
    ours = readers_there(result, OURS_FLOOD, OURS_IDLE)
    made = [stages_table(reader) for reader in ours]
    if ours:
        made += [kinds_table(ours), groups_table(ours), *(waits_table(reader) for reader in ours)]
    pairs = [pair for names in ((OURS_FLOOD, KERNEL_FLOOD), (OURS_IDLE, KERNEL_IDLE))
             if len(pair := readers_there(result, *names)) == 2]
    if pairs:
        made.append(segments_table(pairs))
    return made


def plot(result):
    """For floods and idle pings a bar for each view of vnetr's and one for the kernel's, in pieces as the stages follow
    each other."""
    import plots
    colours = dict(zip(KINDS, ("#94a3b8", "#c2410c", "#fdba74", "#cbd5e1")))
    panels = []
    for names in (OURS_FLOOD, KERNEL_FLOOD), (OURS_IDLE, KERNEL_IDLE):
        bars = [(title, [(reader.mean(group, stage.key), stage.kind) for stage in STAGES])
                for title, reader, group in views(readers_there(result, names[0]))]
        bars += [(reader.title, [(reader.segment(segment), PING if segment == PING_STAGE else KERNEL_WORK)
                                 for segment in SEGMENTS]) for reader in readers_there(result, names[1])]
        panels.append(bars)
    made, axes = plots.grid(len(panels), 1, 9, 0.4 * max(map(len, panels)) + 0.8)
    for axis, bars in zip(axes, panels):
        named = set()
        for place, (_, pieces) in enumerate(bars):
            left = 0
            for span, kind in pieces:
                axis.barh(place, span, left=left, color=colours[kind], edgecolor="white", linewidth=0.6, height=0.7,
                          label=None if kind in named else kind)
                named.add(kind)
                left += span
            axis.annotate(f" {left:,.1f}", (left, place), va="center", fontsize=7)
        axis.set_yticks(range(len(bars)), [title for title, _ in bars])
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_title("mean of each stage, µs, traced", fontsize=8, loc="left")
        axis.legend(fontsize=7, loc="lower right", frameon=False)
    made.tight_layout()
    return made
