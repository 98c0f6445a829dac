"""Alternating rounds: in each, every subject is set up, measured and taken down once, in turn."""

import sys
import time

import forwarders
from lab import Failure, Lab, OthersClock, Unavailable

# The share of a CPU that others may have during a turn before it is called disturbed.
OTHERS_SHARE_MAX = 0.1


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Probe:
    """Takes figures of one subject in one round: a measurement that fails is noted and does not end the others."""

    def __init__(self, result, subject, round_number):
        self.result, self.subject, self.round_number = result, subject, round_number
        self.figures = {}

    def take(self, keys, function, *arguments, **named):
        """`function` returns a figure, a tuple of them, or a dictionary that has the keys."""
        try:
            value = function(*arguments, **named)
        except Failure as failure:
            self.result.fail(f"{self.result.title(self.subject)}, round {self.round_number}, {keys[0]}: {failure}")
            say(f"  {keys[0]} failed: {failure}")
            value = dict.fromkeys(keys)
        if not isinstance(value, dict):
            value = dict(zip(keys, value if isinstance(value, tuple) else (value,)))
        self.figures.update({key: value[key] for key in keys})
        return value


def run(result, subjects, rounds, prepare, work):
    """`subjects`: by key what is measured; `prepare(subject, lab)` sets it up, `work(subject, lab, probe)` measures."""
    for key, subject in subjects.items():
        if isinstance(subject, forwarders.Forwarder):
            try:
                subject.check()
                result.document["versions"][subject.title] = subject.version()
            except Unavailable as reason:
                result.skip(key, str(reason))
    for round_number in range(1, rounds + 1):
        for key, subject in subjects.items():
            if key in result.document["skipped"]:
                continue
            say(f"round {round_number} of {rounds}: {result.title(key)}")
            began = time.monotonic()
            others = OthersClock()
            try:
                with Lab() as lab:
                    prepare(subject, lab)
                    probe = Probe(result, key, round_number)
                    work(subject, lab, probe)
                    result.add(key, probe.figures)
                    if hasattr(subject, "stop"):
                        subject.stop()
            except Unavailable as reason:
                say(f"  skipped: {reason}")
                if result.figures(key, next(iter(result.document["values"][key]), "")):
                    result.fail(f"{result.title(key)}, round {round_number}: {reason}")
                else:
                    result.skip(key, str(reason))
            except Failure as failure:
                say(f"  failed: {failure}")
                result.fail(f"{result.title(key)}, round {round_number}: {failure}")
            passed = time.monotonic() - began
            share = others.seconds() / passed
            result.count_turn(share > OTHERS_SHARE_MAX, share)
            say(f"  {passed:.0f} s" + (f", disturbed: others took {share:.0%} of a CPU"
                                       if share > OTHERS_SHARE_MAX else ""))
    for key in subjects:
        if key in result.document["skipped"]:
            say(f"skipped: {result.title(key)}: {result.document['skipped'][key]}")
