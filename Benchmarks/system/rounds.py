"""Alternating rounds: in each, every subject is set up, measured and taken down once, in turn."""

import sys
import time

import forwarders
from lab import Failure, Lab, OthersClock, Unavailable
from results import Result

# The share of a CPU that other programs and machines may take during a turn before it counts as disturbed.
OTHERS_SHARE_MAX = 0.1
# A disturbed turn is repeated, at most so often; the one that was disturbed least counts.
TRIES_MAX = 3


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Turn:
    """One subject's turn in a round: its figures by key, and what went wrong. A measurement that fails does not end the
    others."""

    def __init__(self, subject, prepare, work):
        self.figures, self.failures, self.unavailable = {}, [], None
        began, others = time.monotonic(), OthersClock()
        try:
            with Lab() as lab:
                prepare(subject, lab)
                work(subject, lab, self)
                if hasattr(subject, "stop"):
                    subject.stop()
        except Unavailable as reason:
            self.unavailable = str(reason)
        except Failure as failure:
            self.failures.append(str(failure))
        self.seconds = time.monotonic() - began
        self.programs, self.machines = (seconds / self.seconds for seconds in others.seconds())

    def take(self, keys, function, *arguments, **named):
        """`function` returns a figure, a tuple of them, or a dictionary that has the keys."""
        try:
            value = function(*arguments, **named)
        except (Failure, LookupError, ArithmeticError, ValueError, OSError) as failure:
            # Reports that lack something, processes that are gone: an hour's measurement goes on after it.
            self.failures.append(f"{keys[0]}: {type(failure).__name__}: {failure}")
            value = dict.fromkeys(keys)
        if not isinstance(value, dict):
            value = dict(zip(keys, value if isinstance(value, tuple) else (value,)))
        self.figures.update({key: value[key] for key in keys})

    @property
    def others(self):
        return self.programs + self.machines

    @property
    def is_disturbed(self):
        return self.others > OTHERS_SHARE_MAX

    def told(self):
        parts = [f"  {self.seconds:.0f} s"]
        if self.is_disturbed:
            parts.append(f"disturbed: other programs took {self.programs:.0%} of a CPU, machines {self.machines:.0%}")
        if self.unavailable:
            parts.append(f"cannot be measured: {self.unavailable}")
        return ", ".join(parts + [f"failed: {failure}" for failure in self.failures])


def undisturbed(effort, subject, prepare, work):
    best = None
    for _ in range(1 if effort.smoke else TRIES_MAX):
        turn = Turn(subject, prepare, work)
        say(turn.told())
        if best is None or turn.others < best.others:
            best = turn
        if not turn.is_disturbed or turn.unavailable:
            break
    return best


def measured(benchmark, options, effort):
    """The result of a benchmark, a module that has

    NAME, TITLE, MEASURES (columns), HOW (lines), REFERENCES (keys of those that others are divided by);
    SMOKE and MAY_BE_MISSING: what a smoke run measures, and the figures that it may lack;
    `subjects()`: all that may be measured, each a Forwarder; `work(effort)`: the function that measures one of them;
    `tables(result)`: more tables; `plot(result)`; perhaps `prepare(subject, lab)`, in place of forwarders.set_up.
    """
    subjects = {each.key: each for each in benchmark.subjects() if not options.only or each.is_always or not {
        each.key, each.part}.isdisjoint(options.only)}
    result = Result.new(
        benchmark.NAME, benchmark.TITLE, benchmark.MEASURES,
        [{"key": each.key, "title": each.title} | each.facts() for each in subjects.values()],
        options.shown(), benchmark.HOW, [key for key in benchmark.REFERENCES if key in subjects])
    prepare = getattr(benchmark, "prepare", forwarders.set_up)
    run(result, subjects, options.rounds, effort, prepare, benchmark.work(effort))
    if {each.group for each in subjects.values()} <= {forwarders.KERNEL, forwarders.OURS}:
        # A line for each would say the same.
        result.document["versions"] = {"kernel": forwarders.kernel_version()}
    result.document["tables"] += benchmark.tables(result)
    return result


def run(result, subjects, rounds, effort, prepare, work):
    """`subjects`: by key what is measured; `prepare(subject, lab)` sets it up, `work(subject, lab, turn)` measures."""
    for key, subject in subjects.items():
        if isinstance(subject, forwarders.Forwarder):
            try:
                subject.check()
                result.document["versions"][subject.title] = subject.version()
            except Unavailable as reason:
                result.skip(key, str(reason))
    measured = set()
    for round_number in range(1, rounds + 1):
        for key, subject in subjects.items():
            if key in result.document["skipped"]:
                continue
            say(f"round {round_number} of {rounds}: {result.title(key)}")
            turn = undisturbed(effort, subject, prepare, work)
            if turn.unavailable and key not in measured:
                result.skip(key, turn.unavailable)
                continue
            measured.add(key)
            result.add(key, turn.figures)
            result.count_turn(turn)
            for failure in turn.failures + ([turn.unavailable] if turn.unavailable else []):
                result.fail(f"{result.title(key)}, round {round_number}: {failure}")
    for key, reason in result.document["skipped"].items():
        say(f"skipped: {result.title(key)}: {reason}")
