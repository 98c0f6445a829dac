"""The kernel's tracer: events of the kernel with their times in nanoseconds, by tracefs.

An instance of one's own is used, which has buffers, switches and filters of its own: other users of the tracer notice
nothing. The text in `trace` has microseconds, so the buffers are read as they are, by `trace_pipe_raw`: pages of binary
records (Linux: include/linux/ring_buffer.h, and events/*/*/format for what is in a record).
"""

import collections
import os
import pathlib
import re
import struct
import subprocess
import tempfile

from lab import Unavailable, interruption

# All CPUs' together; what is older is overwritten.
BUFFERS_BYTES = 32 << 20
# include/linux/ring_buffer.h: `type_len` of a record: up to this a length in words of 4 bytes, else one of the others.
DATA_WORDS_MAX = 28
PADDING, TIME_EXTEND, TIME_STAMP = 29, 30, 31
# A record's word: 5 bits of `type_len`, above them the nanoseconds since the record before.
TYPE_BITS, DELTA_BITS = 5, 27
# What a page's count of bytes has above the count: flags for records that were lost.
COMMIT_MASK = (1 << 20) - 1

# One record, its time in nanoseconds: `kind` is the event's name, `thread` the id of the thread that was running, and
# `values` the fields that were asked for.
Event = collections.namedtuple("Event", "time cpu kind thread values")
# What to trace: the fields to keep, and the kernel's filter expression or "".
Wanted = collections.namedtuple("Wanted", "fields filter")


class Tracer:
    """Use as a context manager. `wanted`: Wanted by event, such as "sched/sched_switch"."""

    def __init__(self, wanted):
        self.wanted = wanted
        self.root = self.mounted = self.instance = None

    def __enter__(self):
        try:
            self._open()
        except OSError as error:
            self.__exit__()
            raise Unavailable(f"the kernel's tracer cannot be used: {error}") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with interruption.held():
            if self.instance:
                os.rmdir(self.instance)
                self.instance = None
            if self.mounted:
                subprocess.run(["umount", "--lazy", self.mounted], check=False)
                os.rmdir(self.mounted)
                self.mounted = None

    def _open(self):
        self.root = pathlib.Path(_mount_point() or self._mount())
        instance = self.root / "instances" / f"vnetr-bench-{os.getpid()}"
        with interruption.held():
            os.mkdir(instance)
            self.instance = instance
        self._set("tracing_on", 0)
        self._set("trace_clock", "mono")
        self._set("buffer_size_kb", BUFFERS_BYTES // 1024 // len(self._cpus()))
        self.decoders = {}
        for event, wanted in self.wanted.items():
            folder = f"events/{event}"
            if not (instance / folder).is_dir():
                raise Unavailable(f"the kernel's tracer has no event {event}")
            decoder = Decoder(event, (instance / folder / "format").read_text(), wanted.fields)
            self.decoders[decoder.number] = decoder
            if wanted.filter:
                self._set(f"{folder}/filter", wanted.filter)
            self._set(f"{folder}/enable", 1)
        header = _fields((self.root / "events/header_page").read_text())
        self.page_bytes = header["data"].offset + header["data"].bytes

    def _mount(self):
        """For as long as this runs."""
        with interruption.held():
            self.mounted = tempfile.mkdtemp(prefix="vnetr-bench-tracefs-")
            done = subprocess.run(["mount", "-t", "tracefs", "none", self.mounted], capture_output=True, text=True,
                                  check=False)
        if done.returncode != 0:
            os.rmdir(self.mounted)
            self.mounted = None
            raise Unavailable(f"tracefs cannot be mounted: {done.stderr.strip()}")
        return self.mounted

    def _set(self, file, value):
        (self.instance / file).write_text(f"{value}\n")

    def _cpus(self):
        return sorted((self.instance / "per_cpu").iterdir())

    def start(self):
        self._set("tracing_on", 1)

    def stop(self):
        self._set("tracing_on", 0)

    def events(self):
        """All that the buffers have, of all CPUs, in order; from the moment on from which no CPU lacks any."""
        self.stop()
        found, begin = [], 0
        for cpu in self._cpus():
            mine = self._of_cpu(cpu)
            if mine and _overwritten(cpu):
                begin = max(begin, mine[0].time)
            found += mine
        found.sort(key=lambda event: event.time)
        return [event for event in found if event.time >= begin]

    def _of_cpu(self, cpu):
        found, number = [], int(cpu.name.removeprefix("cpu"))
        file = os.open(cpu / "trace_pipe_raw", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while page := os.read(file, self.page_bytes):
                found += self._of_page(page, number)
        except BlockingIOError:
            # It is empty.
            pass
        finally:
            os.close(file)
        return found

    def _of_page(self, page, cpu):
        time, commit = struct.unpack_from("=QQ", page)
        position, end = 16, 16 + (commit & COMMIT_MASK)
        while position < end:
            word, = struct.unpack_from("=I", page, position)
            kind, delta = word & ((1 << TYPE_BITS) - 1), word >> TYPE_BITS
            position += 4
            if 0 < kind <= DATA_WORDS_MAX:
                data, position = position, position + 4 * kind
            else:
                further, = struct.unpack_from("=I", page, position)
                if kind == TIME_EXTEND:
                    time += (further << DELTA_BITS) + delta
                    position += 4
                    continue
                if kind == TIME_STAMP:
                    time = (further << DELTA_BITS) + delta
                    position += 4
                    continue
                if kind == PADDING and delta == 0:
                    return
                data, position = position + 4, position + further
            time += delta
            if kind == PADDING:
                continue
            number, = struct.unpack_from("=H", page, data)
            if number in self.decoders:
                yield self.decoders[number].event(time, cpu, page, data)


def _mount_point():
    with open("/proc/self/mounts", encoding="utf-8") as file:
        for line in file:
            _, where, kind, *_ = line.split()
            if kind == "tracefs":
                return where
    return None


def _overwritten(cpu):
    return int(re.search(r"^overrun: (\d+)", (cpu / "stats").read_text(), re.MULTILINE)[1]) > 0


Field = collections.namedtuple("Field", "kind offset bytes signed")


def _fields(text):
    """The fields of a format file by their names."""
    pattern = r"field:\s*(.+?)\s*(\w+)(?:\[\d*\])?;\s*offset:(\d+);\s*size:(\d+);\s*signed:([01]);"
    return {name: Field(kind, int(offset), int(size), signed == "1")
            for kind, name, offset, size, signed in re.findall(pattern, text)}


class Decoder:
    """Of the records of one event."""

    LETTERS = {1: "b", 2: "h", 4: "i", 8: "q"}

    def __init__(self, event, text, names):
        self.kind = event.rpartition("/")[2]
        self.number = int(re.search(r"^ID: (\d+)", text, re.MULTILINE)[1])
        fields = _fields(text)
        missing = [name for name in names if name not in fields]
        if missing:
            raise Unavailable(f"the kernel's event {event} has no field {', '.join(missing)}")
        self.thread = self._reader(fields["common_pid"])
        self.readers = [self._reader(fields[name]) for name in names]

    def _reader(self, field):
        if field.kind.startswith("__data_loc"):
            return lambda page, data: _text(page, data, field.offset)
        letter = self.LETTERS[field.bytes]
        number = struct.Struct("=" + (letter if field.signed else letter.upper()))
        return lambda page, data: number.unpack_from(page, data + field.offset)[0]

    def event(self, time, cpu, page, data):
        return Event(time, cpu, self.kind, self.thread(page, data), [read(page, data) for read in self.readers])


def _text(page, data, offset):
    """A string lies behind the record's fields; its field has the offset, and above it the length with the final 0."""
    where, = struct.unpack_from("=I", page, data + offset)
    begin, size = data + (where & 0xFFFF), where >> 16
    return page[begin:begin + size - 1].decode("ascii", "replace")
