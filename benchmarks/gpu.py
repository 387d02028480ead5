"""All that is to be learnt on a machine with a GPU, in one command: probes, the kernels' tests, every GPU benchmark; `make gpu`.

Each part is a process of its own with a time limit, and what becomes of one does not concern the others. `results/gpu_*.md` get what was printed, with
hardware, date and command, and `results/gpu/*.json` times for `afd-ray plan --measured`. Ends with 0 if every part did, with 2 where there is no GPU.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ABSENT = 2
"""What a benchmark ends with where it finds no GPU."""
SHORT_MINUTES = 15.0
"""Below it benchmarks run with --quick."""
TEST_PROCESSES = 6
"""What takes time is compiling."""
LEAST_S = 5.0
"""A part is not begun with less."""
ORDER = (
    "gpu_probe",
    "gpu_tests",
    "gpu_step",
    "gpu_ffn_step",
    "gpu_experts",
    "gpu_attention",
    "gpu_decode_step",
    "gpu_end_to_end",
)
"""The others follow, by name."""
LIMITS_S = {"gpu_probe": 60.0, "gpu_tests": 240.0, "gpu_step": 240.0, "gpu_end_to_end": 300.0}
LIMIT_S = 180.0
WRITES_TIMES = ("gpu_step", "gpu_ffn_step", "gpu_experts", "gpu_attention")


class Part(NamedTuple):
    """What is run."""

    name: str
    command: list[str]
    limit_s: float
    times: Path | None = None
    """Where the command writes times for the planner."""
    environment: dict[str, str] | None = None
    """Beside this process's own."""
    is_table: bool = True
    """Whether it prints Markdown."""


class Outcome(NamedTuple):
    """What became of a part."""

    part: Part
    code: int | None
    """It ended with; None: it was ended at its limit, or not begun."""
    took_s: float
    output: str

    @property
    def told(self) -> str:
        if self.code is None:
            return f"ended after {self.took_s:.0f} s, its limit" if self.took_s else "not begun: no time was left"
        return f"{self.took_s:.0f} s" if not self.code else f"failed with {self.code} after {self.took_s:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=60.0, metavar="N", help=f"for all of it; below {SHORT_MINUTES:g} with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="each benchmark with its few most wanted sizes")
    parser.add_argument("--only", action="append", metavar="NAME", help="a part, as gpu_step; may be given again")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args(argv)
    parts = parts_of(args.results, quick=args.quick or args.minutes < SHORT_MINUTES)
    unknown = sorted(set(args.only or ()) - {part.name for part in parts})
    if unknown:
        parser.error(f"--only: must be of {', '.join(part.name for part in parts)}, got {', '.join(unknown)}")
    chosen = [part for part in parts if not args.only or part.name in args.only]
    return run_all(chosen, args.results, args.minutes * 60)


def parts_of(results: Path, *, quick: bool) -> list[Part]:
    """In the order of what is most wanted, should time run out."""
    found = sorted(file.stem for file in Path(__file__).parent.glob("gpu_*.py"))
    names = [*ORDER, *(name for name in found if name not in ORDER)]
    return [_tests() if name == "gpu_tests" else _benchmark(name, results, quick) for name in names]


def _tests() -> Part:
    """Of the kernels, compiled, in several processes where pytest can do that: Ray need not be there, which the suite's own settings and fixtures ask for."""
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_gpu_*.py"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        str(ROOT),
        "--noconftest",
        "-m",
        "not full",
        "--continue-on-collection-errors",
        *(["-n", str(TEST_PROCESSES), "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []),
        *files,
    ]
    return Part("gpu_tests", command, LIMITS_S["gpu_tests"], None, {"TRITON_INTERPRET": "0"}, is_table=False)


def _benchmark(name: str, results: Path, quick: bool) -> Part:
    times = results / "gpu" / f"{name}.json" if name in WRITES_TIMES else None
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{name}",
        *(["--quick"] if quick else []),
        *(["--json", str(times)] if times else []),
    ]
    return Part(name, command, LIMITS_S.get(name, LIMIT_S), times)


def run_all(
    parts: Sequence[Part], results: Path, seconds: float, clock: Callable[[], float] = time.monotonic, machine: str | None = None
) -> int:
    """Each in its turn, until the time is over; `machine`: what it is called, None: ask for it. Gives what the command ends with."""
    deadline = clock() + seconds
    outcomes = []
    for part in parts:
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        outcome = run(part, min(part.limit_s, deadline - clock()))
        if outcome.code == ABSENT and part.is_table and not outcomes:
            print(outcome.output.strip(), file=sys.stderr)
            return ABSENT
        machine = machine or hardware()
        write(outcome, results, machine)
        outcomes.append(outcome)
        print(f"{part.name}: {outcome.told}", flush=True)
    return 0 if all(outcome.code == 0 for outcome in outcomes) else 1


def run(part: Part, limit_s: float) -> Outcome:
    """Its process and all that it started end with the limit; what it printed until then is kept."""
    if limit_s < min(LEAST_S, part.limit_s):
        return Outcome(part, None, 0.0, "")
    if part.times is not None:
        part.times.parent.mkdir(parents=True, exist_ok=True)
        part.times.unlink(missing_ok=True)
    started_s = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **(part.environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        printed.seek(0)
        return Outcome(part, code, time.monotonic() - started_s, printed.read())


def _end(process: "subprocess.Popen[bytes]") -> None:
    """With all processes of its session: none of them may keep the GPU."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(outcome: Outcome, results: Path, machine: str) -> None:
    """A part that was not begun leaves what an earlier run wrote."""
    part = outcome.part
    if not outcome.took_s:
        return
    results.mkdir(parents=True, exist_ok=True)
    output = outcome.output.strip()
    body = output if part.is_table else f"```\n{output}\n```"
    command = " ".join(["python", *part.command[1:]]).replace(str(results), "benchmarks/results").replace(f"{ROOT}{os.sep}", "")
    text = f"# {part.name}\n\n{machine}, {date.today().isoformat()}. `{command}`: {outcome.told}.\n\n{body}\n"
    (results / f"{part.name}.md").write_text(text, encoding="utf-8")


def hardware() -> str:
    """As the driver names it; without its program only that there is one is known."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "a CUDA GPU"
    said = subprocess.run([program, "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    name, _, driver = (said.stdout.strip().splitlines() or ["a CUDA GPU"])[0].partition(", ")
    return f"{name}, driver {driver}" if driver else name


if __name__ == "__main__":
    sys.exit(main())
