"""Run seeds, and tell of the first that violates what must hold."""

import argparse
import time

from afd_ray.simulation.protocol.run import run_seed, trace_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m afd_ray.simulation.protocol", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the first seed (default 0)")
    parser.add_argument("--trace", action="store_true", help="print what happened in the first seed, whatever it was")
    arguments = parser.parse_args()
    if arguments.trace:
        print("\n".join(trace_seed(arguments.first)))
        return 0
    started_s, events, virtual_s, recoveries, rollbacks = time.perf_counter(), 0, 0.0, 0, 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        report = run_seed(seed)
        events, virtual_s = events + report.events, virtual_s + report.virtual_s
        recoveries, rollbacks = recoveries + report.recoveries, rollbacks + report.rollbacks
        if report.violation is not None:
            print("\n".join(trace_seed(seed)))
            print(f"seed {seed}: {report.violation}\nagain: python -m afd_ray.simulation.protocol --first {seed} --seeds 1")
            return 1
    wall_s = time.perf_counter() - started_s
    print(
        f"{arguments.seeds} seeds without a violation: {arguments.seeds / wall_s:.0f} seeds/s, {events / wall_s:.0f} events/s,"
        f" {virtual_s / 3600:.1f} h of virtual time, {recoveries} recoveries, {rollbacks} roll backs"
    )
    return 0


raise SystemExit(main())
