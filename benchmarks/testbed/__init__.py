"""Several hosts on one machine, with links that delay, lose, slow down and break: `with bed() as hosts`, or `python -m benchmarks.testbed up`."""

from benchmarks.testbed.bed import Bed, Host, bed, why_not
from benchmarks.testbed.switch import CUT, PERFECT, Link

__all__ = ["CUT", "PERFECT", "Bed", "Host", "Link", "bed", "why_not"]
