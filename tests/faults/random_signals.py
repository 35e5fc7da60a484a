"""Kills sweeps at random moments, and compares what they give in the end with an undisturbed sweep, bit by bit.

    python tests/faults/random_signals.py 200 --seed 0

Each trial is a sweep of three methods in a folder of its own. It is killed in one of its phases: once that has begun,
at a random time within the time that it takes. What `status` says is checked, the same command is given again, perhaps
killed again, and so on to its end. Then rows, documents, summary.csv, comparisons.csv and curves.parquet must be those
of the undisturbed sweep, and there must be no other files. Ends with status 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import harness
from harness import METHODS, OPTIONS, PACKS, Command, Expected, as_exit

PHASES = ("start-up", "imports", "statistics", "evaluation", "writing", "report", "packs")
SIGNALS = ("ctrl-c", "ctrl-c twice", "hang-up", "SIGTERM", "SIGKILL", "SIGINT")
TO_A_PACK = ("SIGUSR2", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
AGAIN = 0.35  # of the commands that go on are killed, too
RETRY = 0.15  # of the commands that go on are `retry`
WAITED = "stopped while it waited"  # what is said of a run that was never begun
DIES = 60.0  # seconds within which a process must end after a signal, with its packs


@dataclass(frozen=True)
class Moment:
    """A random moment of a phase, as a share of the time that the phase takes."""

    phase: str
    method: str
    share: float


@dataclass
class Trial:
    number: int
    sent: list[tuple[str, str]] = field(default_factory=list)  # phase and signal
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    late: int = 0  # signals for which the phase was over too soon


def run_of(cwd: Path, method: str) -> Path | None:
    return next(iter((cwd / "results" / "s").glob(f"*-{method}-s0-*")), None)


def has_begun(phase: str, method: str, cwd: Path, n_batches: int) -> bool:
    """From the files alone."""
    if phase in ("start-up", "imports", "anywhere"):
        return True
    if phase == "report":
        runs = [run_of(cwd, each) for each in METHODS]
        return all(run is not None and _finished(run) for run in runs)
    run = run_of(cwd, method)
    if run is None:
        return False
    if phase == "statistics":
        return (run / "environment.json").exists()
    names = os.listdir(run)
    n_done = sum(name.startswith("progress-") for name in names)
    if phase == "evaluation":
        return n_done > 0 or "rows.parquet" in names
    return n_done >= n_batches or "documents.parquet" in names  # writing


def _finished(run: Path) -> bool:
    try:
        return '"finished"' in (run / "status.json").read_text()
    except OSError:
        return False


@dataclass
class Undisturbed:
    """What a sweep gives when it is left alone, and how long its phases take."""

    expected: Expected
    n_batches: int
    seconds: dict[str, float]  # of phase, or phase and method

    def seconds_of(self, phase: str, method: str) -> float:
        return self.seconds.get(f"{phase} {method}", self.seconds.get(phase, 1.0))


def undisturbed(folder: Path, options: tuple[str, ...]) -> Undisturbed:
    n_batches, seconds = 10**6, {}
    for _ in range(2):  # the first one finds out how many batches there are
        harness.remove(folder)
        folder.mkdir()
        began, most = time.monotonic(), 0
        command = harness.start(folder, *options)
        times: dict[str, float] = {}
        while command.poll() is None:
            for method in METHODS:
                if (run := run_of(folder, method)) is None:
                    continue
                for phase in ("statistics", "evaluation", "writing"):
                    if f"{phase} {method}" not in times and has_begun(phase, method, folder, n_batches):
                        times[f"{phase} {method}"] = time.monotonic()
                if f"finished {method}" not in times and _finished(run):
                    times[f"finished {method}"] = time.monotonic()
                most = max(most, len(list(run.glob("progress-*"))))
            if "report" not in times and has_begun("report", "", folder, 0):
                times["report"] = time.monotonic()
            time.sleep(0.001)
        if command.code:
            sys.exit(f"the undisturbed sweep fails\n{command.said}")
        end, n_batches = time.monotonic(), most
    seconds = {"anywhere": end - began, "start-up": times["statistics zero"] - began, "report": end - times["report"]}
    for method in METHODS:
        at = [times[f"{phase} {method}"] for phase in ("statistics", "evaluation", "writing", "finished")]
        for phase, start, stop in zip(("statistics", "evaluation", "writing"), at, at[1:], strict=False):
            seconds[f"{phase} {method}"] = stop - start
    return Undisturbed(Expected.of(folder), n_batches, seconds)


def seconds_of_imports(folder: Path) -> float:
    began = time.monotonic()
    folder.mkdir()
    command = harness.start(folder, *OPTIONS, fresh=True)
    while command.poll() is None and run_of(folder, METHODS[0]) is None:
        time.sleep(0.005)
    took = time.monotonic() - began
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    harness.remove(folder)
    return took


def strike(command: Command, what: str, picked: random.Random) -> None:
    if what.startswith("ctrl-c"):
        command.type_ctrl_c()
        if what == "ctrl-c twice":
            time.sleep(picked.uniform(0.0, 0.3))
            command.type_ctrl_c()
    elif what == "hang-up":
        command.hang_up()
    else:
        os.kill(command.pid, getattr(signal, what))


def disturbed(
    command: Command, moment: Moment, what: str, to_pack: bool, known: Undisturbed, picked: random.Random
) -> bool:
    """Whether the signal was sent before the command had ended."""
    began = None
    wait = moment.share * known.seconds_of(moment.phase, moment.method)
    while command.poll() is None:
        if began is None and has_begun(moment.phase, moment.method, command.cwd, known.n_batches):
            began = time.monotonic()
        if began is not None and time.monotonic() >= began + wait:
            if not to_pack:
                strike(command, what, picked)
                return True
            if packs := harness.processes_in(command.cwd):
                try:
                    os.kill(picked.choice(packs), getattr(signal, what))
                    return True
                except ProcessLookupError:
                    return False
            if moment.phase == "report":
                return False
        time.sleep(0.001)
    return False


def check_after(trial: Trial, cwd: Path, known: Undisturbed, what: str) -> None:
    """What `status` says is true, and what is called finished is whole."""
    if not (cwd / "results" / "s").is_dir() or not list((cwd / "results" / "s").glob("*/status.json")):
        return
    for name, (state, why) in harness.states_told(cwd).items():
        run = cwd / "results" / "s" / name
        if state not in ("finished", "died", "interrupted"):
            trial.faults.append(f"status after {what}: {name} is {state} ({why})")
        if state == "interrupted" and why.startswith(WAITED) and list(run.glob("progress-*")):
            trial.faults.append(f"status after {what}: {name} has begun, but {why}")
        for table in harness.TABLES if state == "finished" else ():
            key = f"results/s/{name}/{table}"
            if not (cwd / key).exists() or (cwd / key).read_bytes() != known.expected.tables[key]:
                trial.faults.append(f"called finished after {what}, but differs: {key}")


def begun(cwd: Path) -> dict[Path, int]:
    """Batches that are done of each run."""
    runs = {path.parent for path in (cwd / "results" / "s").glob("*/status.json")}
    return {run: n for run in runs if (n := len(list(run.glob("progress-*.parquet")))) and not _finished(run)}


def finished(cwd: Path) -> dict[Path, int]:
    """When the rows of each finished run were written."""
    paths = (cwd / "results" / "s").glob("*/rows.parquet")
    return {path: path.stat().st_mtime_ns for path in paths if _finished(path.parent)}


def one_trial(number: int, seed: int, base: Path, known: dict[str, Undisturbed], phase: str, kind: int) -> Trial:
    picked = random.Random(f"{seed} {number}")
    trial, cwd = Trial(number), base / f"trial-{number}"
    cwd.mkdir()
    in_packs = phase == "packs"
    reference = known["packs" if in_packs else "plain"]
    options = (*OPTIONS, *PACKS) if in_packs else OPTIONS
    moment = Moment(phase, picked.choice(METHODS), picked.random())
    if in_packs:
        inside = picked.choice(("start-up", "statistics", "evaluation", "writing", "report"))
        moment = Moment(inside, moment.method, moment.share)
    elif phase == "statistics":
        moment = Moment(phase, picked.choice(METHODS[1:]), moment.share)
    before: dict[Path, int] = {}
    rows: dict[Path, int] = {}
    for attempt in range(12):
        strikes = attempt == 0 or (attempt < 6 and picked.random() < AGAIN)
        if attempt and strikes:
            moment = Moment("anywhere", METHODS[0], picked.random())
        to_pack = in_packs and moment.phase != "report" and picked.random() < 0.5
        signals = TO_A_PACK if to_pack else SIGNALS
        what = signals[kind % len(signals)] if attempt == 0 else picked.choice(signals)
        retries = attempt > 0 and picked.random() < RETRY and bool(list((cwd / "results").glob("s/*/status.json")))
        arguments = ("ablation_sweeps", "retry", "results/s") if retries else options
        terminal = strikes and (what.startswith("ctrl-c") or what == "hang-up")
        command = harness.start(cwd, *arguments, terminal=terminal, fresh=moment.phase == "imports" and strikes)
        hit = strikes and disturbed(command, moment, what, to_pack, reference, picked)
        described = f"{what}{' to a pack' * to_pack} in {moment.phase} ({moment.method}, {moment.share:.2f})"
        if not command.wait(DIES if hit and not to_pack else harness.HANGS):
            trial.faults.append(f"hangs after {described}" if hit else f"hangs: {arguments[:3]}: {command.said[-500:]}")
        until = time.monotonic() + DIES
        while (packs := harness.processes_in(cwd)) and time.monotonic() < until:
            time.sleep(0.05)
        for pid in packs:
            trial.faults.append(f"a pack goes on after {described}")
            os.kill(pid, signal.SIGKILL)
        said = command.said
        for run, n in before.items():  # what was done is not done again
            log = (run / "log").read_text(errors="replace") if (run / "log").exists() else ""
            if _finished(run) and f"continues after {n} batch" not in log:
                trial.faults.append(f"lost: {n} batches of {run.name}")
        for path, written in rows.items():
            if path.stat().st_mtime_ns != written:
                trial.faults.append(f"computed again: {path.parent.name}")
        if hit:
            trial.sent.append((f"packs: {moment.phase}" if in_packs else "resumed" if attempt else phase, what))
            if what.startswith(("ctrl-c", "SIGINT")) and "Traceback" in said:
                trial.notes.append(f"traceback after {described}: {said.strip().splitlines()[-1][:200]}")
            if command.code != 0:
                check_after(trial, cwd, reference, described)
        elif strikes:
            trial.late += 1
        if command.code == 0 and not retries:
            break
        if not hit and command.code:
            trial.faults.append(f"{' '.join(arguments[:3])}: {as_exit(command.code)}: {said.strip()[-1500:]}")
            break
        if to_pack and hit and command.code:
            trial.faults.append(f"the launcher: {as_exit(command.code)} after {described}: {said.strip()[-1500:]}")
        before, rows = begun(cwd), finished(cwd)
    else:
        trial.faults.append("never ends")
    trial.faults += reference.expected.faults(cwd, lambda name: "/.dispatch/" in name)
    for path in cwd.rglob(".dispatch/*.tmp"):
        trial.faults.append(f"stays: {path.relative_to(cwd)}")
    if not trial.faults:
        harness.remove(cwd)
    return trial


def work(
    numbers: list[int],
    count: int,
    seed: int,
    base: Path,
    known: dict[str, Undisturbed],
    phases: list[str],
    to: Path,
    until: float,
) -> None:
    """Trials until so many signals were sent; each is written down as soon as it is over."""
    sent = 0
    for number in numbers:
        if sent >= count or time.monotonic() > until:
            return
        phase, kind = phases[number % len(phases)], number % len(phases) + number // len(phases)
        try:
            trial = one_trial(number, seed, base, known, phase, kind)
        except Exception as error:
            trial = Trial(number, faults=[f"{phase}: {type(error).__name__}: {error}"])
        sent += len(trial.sent)
        with open(to, "a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        for fault in trial.faults:
            print(f"trial {number} {trial.sent}: {fault}", flush=True)


def table(trials: list[Trial]) -> str:
    sent = Counter(pair for trial in trials for pair in map(tuple, trial.sent))
    phases, signals = list(dict.fromkeys(p for p, _ in sorted(sent))), sorted({s for _, s in sent})
    width = max(len(phase) for phase in ["phase", *phases])
    lines = [f"{'phase':<{width}}  " + "  ".join(f"{s:>12}" for s in [*signals, "all"])]
    for phase in phases:
        counts = [sent[phase, s] for s in signals]
        lines.append(f"{phase:<{width}}  " + "  ".join(f"{n or '':>12}" for n in [*counts, sum(counts)]))
    totals = [sum(n for (_, s), n in sent.items() if s == of) for of in signals]
    lines.append(f"{'all':<{width}}  " + "  ".join(f"{n:>12}" for n in [*totals, sum(totals)]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="signals that are sent, at the least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default=",".join(PHASES), help=f"of {', '.join(PHASES)}")
    parser.add_argument("--workers", type=int, default=1, help="sweeps at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no sweep is begun later, if fewer were sent")
    parser.add_argument("--keep", type=Path, help="a folder for the sweeps; those with a fault stay there")
    options = parser.parse_args()
    base = harness.workplace(parser, options.keep, "signals-")
    phases = options.phases.split(",")
    began = time.monotonic()
    with harness.importing_the_same(base):
        undisturbed(base / "plain", OPTIONS)
    known = {"plain": undisturbed(base / "plain", OPTIONS)}
    if "packs" in phases:
        known["packs"] = undisturbed(base / "packs", (*OPTIONS, *PACKS))
        assert known["packs"].expected.tables == known["plain"].expected.tables, "packs give other numbers"
    if "imports" in phases:
        known["plain"].seconds["imports"] = seconds_of_imports(base / "imports")
    for name, of in known.items():
        print(
            f"{name}: {of.n_batches} batches, " + ", ".join(f"{k} {v:.2f} s" for k, v in of.seconds.items()), flush=True
        )
    files = []
    for worker in range(options.workers):
        files.append(base / f"worker-{worker}.jsonl")
        files[-1].unlink(missing_ok=True)
        share = options.count // options.workers + (worker < options.count % options.workers)
        if not os.fork():
            code = 1
            try:
                numbers = list(range(worker, 10 * options.count, options.workers))
                work(numbers, share, options.seed, base, known, phases, files[-1], began + 60 * options.minutes)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in files]
    trials = [Trial(**json.loads(line)) for file in files if file.exists() for line in file.read_text().splitlines()]
    faults = [fault for trial in trials for fault in trial.faults]
    notes = Counter(note.partition(" (")[0] for trial in trials for note in trial.notes)
    print(table(trials))
    print(
        f"{sum(len(t.sent) for t in trials)} signals in {len(trials)} sweeps, {sum(t.late for t in trials)} more came "
        f"too late; {time.monotonic() - began:.0f} s; seed {options.seed}; {len(faults)} faults"
    )
    for note, n in notes.items():
        print(f"note, {n} times: {note}")
    if not faults and not options.keep:
        shutil.rmtree(base)
    elif faults:
        print(f"sweeps with a fault: {base}")
    return 1 if faults or any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
