"""One line for each thing that befalls a request, in the log file of the process that does it: `grep` follows a request by its id."""

import logging
import sys

requests = logging.getLogger("afd_ray.requests")


def log_requests() -> None:
    """Write these lines to stderr, of which Ray keeps a file for each process, whatever other loggers do there; harmless when repeated."""
    if requests.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s request %(message)s"))
    requests.addHandler(handler)
    requests.setLevel(logging.INFO)
    requests.propagate = False
