"""Sends Ethernet frames with many MAC addresses from eth0; scale.py runs it in a guest.

from-each {count, other, frames_per_second}: one frame from each of the addresses to the other guest's.
to-each {count, other, seconds}: frames to each of the addresses in turn, from the guest's own (`other`).
Prints the seconds that it took.
"""

import errno
import json
import socket
import sys
import time

# A frame of 60 bytes, 64 with its frame check sequence; IEEE 802's EtherType for local experiments.
REST = b"\x88\xb5" + bytes(46)
BATCH_FRAMES = 100


def addresses(count):
    # Spread over all bits as real ones are not; the first byte says unicast, locally administered. An odd factor makes
    # no address twice.
    return [b"\x02" + (number * 0x9E3779B97F % (1 << 40)).to_bytes(5, "big") for number in range(1, count + 1)]


def send(device, frame):
    try:
        device.send(frame)
    except OSError as error:
        # The device's queue is full.
        if error.errno != errno.ENOBUFS:
            raise
        time.sleep(0.001)


def from_each(device, count, other, frames_per_second):
    rest = bytes.fromhex(other.replace(":", "")), REST
    start = time.monotonic()
    for sent, address in enumerate(addresses(count)):
        if sent % BATCH_FRAMES == 0:
            time.sleep(max(0, start + sent / frames_per_second - time.monotonic()))
        send(device, rest[0] + address + rest[1])


def to_each(device, count, other, seconds):
    rest = bytes.fromhex(other.replace(":", "")) + REST
    targets = addresses(count)
    end = time.monotonic() + seconds
    while True:
        for sent, address in enumerate(targets):
            if sent % BATCH_FRAMES == 0 and time.monotonic() > end:
                return
            send(device, address + rest)


def main():
    how, arguments = sys.argv[1], json.loads(sys.argv[2])
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as device:
        device.bind(("eth0", 0))
        began = time.monotonic()
        {"from-each": from_each, "to-each": to_each}[how](device, **arguments)
        print(time.monotonic() - began)


main()
