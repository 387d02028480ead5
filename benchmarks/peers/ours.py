"""This project through its Python API: one attention and one FFN actor, or both halves in one actor."""

import argparse
from functools import partial
from typing import Any

from actors.cluster import Cluster
from afd_ray.config import ConfigError, parse_config
from afd_ray.request import SamplingParams
from benchmarks.peers.protocol import Answer, Job, Pipe


def configuration(checkpoint: str, threads: int, *, colocated: bool = False, shared: bool = False) -> dict[str, Any]:
    """All cores for the one actor, or half of them for each of two; `shared`: shared experts at attention."""
    cores = threads if colocated else max(1, threads // 2)
    return {
        "model": {"path": checkpoint},
        "attention": {"replicas": 1, "num_cpus": cores, "shared_expert": shared},
        "ffn": {"colocated": colocated, "num_cpus": cores},
    }


def generate(cluster: Cluster, job: Job) -> Answer:
    params = SamplingParams(max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True)
    return Answer([list(generation.times_s) for generation in cluster.generate(job.prompts, params)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--threads", type=int, required=True)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--colocated", action="store_true")
    mode.add_argument("--shared", action="store_true", help="shared experts at attention")
    args = parser.parse_args()
    pipe = Pipe()
    try:
        config = parse_config(configuration(args.checkpoint, args.threads, colocated=args.colocated, shared=args.shared))
        with Cluster.start(config) as cluster:
            pipe.serve(partial(generate, cluster))
    except ConfigError as refused:
        pipe.refuse(str(refused))


if __name__ == "__main__":
    main()
