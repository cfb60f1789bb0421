"""The timings of a run: those taken when its images were made, and those of `retime=true`, of which the newest count.

    timings*.jsonl    one line per image and retiming: {"id", "launch", "batch", "batch_rows", "seconds"}

A launch that times a run again carries the `retime` of its session in provenance.jsonl: several launches share it where
one was killed. Launches that took turns with another run carry `turns`, which both of them share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from evaluation.run_folder import Id, Record, RunFolder, Snapshot, record_id

CPU_SHARE = 0.8  # share of the CPU time that a launch asked for, below which its timings are inflated
GPU_DISTURBED = 0.05  # share of the looks at a GPU that found another process at work, or clocks lowered by heat


def newest_timings(run: Snapshot) -> list[Record]:
    """Return the records whose times count, each with the seconds, launch and batch of its newest timing.

    After a retiming they are the images it has timed; before, those that were made without `trace=`. One that was killed
    takes no timing away: it counts when it is resumed to its end.
    """
    ended = {entry["retime"] for entry in run.launches if "retime" in entry and entry.get("retimed")}
    sessions = [timed for session, timed in retimings(run).items() if session in ended]
    return sessions[-1] if sessions else [r for r in run.records if not run.folder.traced(r)]


def retimings(run: Snapshot) -> dict[str, list[Record]]:
    """Return the records of each retiming with its times in theirs, the oldest session first."""
    void = {entry["retime"] for entry in run.launches if entry.get("void")}  # other tokens came out
    launches = {entry["launch"]: entry for entry in run.launches if entry.get("retime") not in void}
    records = {record_id(record): record for record in run.records}
    sessions: dict[str, dict[Id, Record]] = {}
    for timing in sorted(run.timings, key=lambda line: line["launch"]):
        session, record = launches.get(timing["launch"], {}).get("retime"), records.get(record_id(timing))
        if session and record:
            sessions.setdefault(session, {})[record_id(timing)] = record | timing
    return {session: [found[key] for key in sorted(found)] for session, found in sessions.items()}


def unfinished_retiming(run: RunFolder) -> str | None:
    """Return the session of the newest retiming if it was killed before its end, to be resumed."""
    entries = [entry for entry in run.provenance() if "retime" in entry]
    if not entries or any(e.get("retimed") or e.get("void") for e in entries if e["retime"] == entries[-1]["retime"]):
        return None
    return str(entries[-1]["retime"])


def untimed(run: RunFolder, ids: Iterable[Id], session: str) -> list[Id]:
    """Return those of `ids` that a retiming lacks, in their order."""
    timed = {record_id(record) for record in retimings(Snapshot(run)).get(session, ())}
    return [key for key in ids if key not in timed]


def disturbance(launches: Sequence[dict[str, Any]]) -> str:
    """Return what disturbed the timings of launches, '' if nothing is known to have: a CPU or GPU that others used, heat."""
    shares = [entry["cpu_share"] for entry in launches if "cpu_share" in entry]
    found = []
    if shares and min(shares) < CPU_SHARE:
        found.append(f"got only {100 * min(shares):.0f} % of its CPU")
    for key, what in (("gpu_shared", "shared its GPU"), ("gpu_throttled", "had a throttled GPU")):
        worst = max((entry.get(key, 0.0) for entry in launches), default=0.0)
        if worst > GPU_DISTURBED:
            found.append(f"{what} for {100 * worst:.0f} % of the time")
    return " and ".join(found)
