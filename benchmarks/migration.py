"""When is sending the keys and values of a request cheaper than computing them again? Two colocated attention loops of one process.

Bound: a plain copy of as many bytes within this process. Sending copies them into the kernel and out of it, over a socket of this host.
"""

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from actors.departure import Departure
from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.local import LocalCluster
from afd_ray.engine.migration import Prospect
from afd_ray.engine.moving_in import MovingIn
from afd_ray.handoff.kv_fetcher import KVFetcher
from afd_ray.kernels.packed import packed_attention, packed_ffn
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn
from afd_ray.request import KVTicket, Request, SamplingParams
from benchmarks._machine import hardware
from benchmarks.wire import preset_in

HOST, SECRET, DIGEST = "127.0.0.1", b"one process", 0
EPOCH = Epoch(1, attention=2, tensor_parallel=1, expert_parallel=0, micro_batches=1)
CONTEXTS = (16, 64, 256, 1024, 3584)
COPIED_BYTES = 64 << 20
POLL_S = 0.001
TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint (default: step3-92m, made in a temporary directory)")
    parser.add_argument("--repeat", type=int, default=3, help="requests of each context; medians are shown")
    parser.add_argument("--quick", action="store_true", help="one request of each, short contexts alone")
    args = parser.parse_args(argv)
    contexts = CONTEXTS[:3] if args.quick else CONTEXTS
    with TemporaryDirectory() as made:
        checkpoint = Checkpoint.open(args.model or preset_in(Path(made) / "step3-92m"))
        rows = measure(checkpoint, contexts, 1 if args.quick else args.repeat)
    copy_gb_per_s = copy_rate() / 1e9
    for row in rows:
        row["bound_ms"] = round(row["kv_bytes"] / copy_gb_per_s / 1e6, 3)
    command = "python -m benchmarks.migration" + (" --quick" if args.quick else f" --repeat {args.repeat}")
    result = {"date": date.today().isoformat(), "hardware": hardware(), "command": command}
    print(json.dumps(result | {"copy_gb_per_s": round(copy_gb_per_s, 2), "contexts": rows}))
    return 0


def measure(checkpoint: Checkpoint, contexts: Sequence[int], repeat: int) -> list[dict[str, Any]]:
    half = packed_attention(load_attention(checkpoint))
    cluster = LocalCluster(half, lambda shard: packed_ffn(load_ffn(checkpoint, shard)), EPOCH, num_blocks=1024)
    with cluster:
        _, taker = cluster.attention
        taker.moving_in = MovingIn(taker.scheduler, taker.cache, KVFetcher(HOST, SECRET, DIGEST))
        computed_again_ms(cluster, 600, repeat)  # nothing is decided before anything has been measured
        return [row(cluster, context, repeat) for context in contexts]


def row(cluster: LocalCluster, context: int, repeat: int) -> dict[str, Any]:
    leaver, taker = cluster.attention
    sent_ms, prospects = [], []
    for ticket, departure in kept(leaver, cluster.config.vocab_size, context, repeat):
        prospects.append(expected(taker, ticket))
        sent_ms.append(fetched_ms(fetcher_of(taker), ticket, taker.cache))
        departure.await_taken(TIMEOUT_S)
        departure.close()
    recompute_ms = computed_again_ms(cluster, context, repeat)
    return {
        "context": context,
        "kv_bytes": context * taker.cache.token_bytes,
        "recompute_ms": round(recompute_ms, 2),
        "send_ms": round(median(sent_ms), 2),
        "expected_recompute_ms": round(median(p.recompute_s or 0.0 for p in prospects) * 1000, 2),
        "expected_send_ms": round(median(p.fetch_s for p in prospects) * 1000, 2),
        "sends": sum(p.fetches for p in prospects),
    }


def kept(leaver: AttentionLoop, vocab: int, context: int, repeat: int) -> list[tuple[KVTicket, Departure]]:
    """Requests with so many computed tokens, given back by the loop, which goes on."""
    params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    tickets = []
    for number in range(repeat):
        leaver.submit(Request(f"sent-{context}-{number}", prompt(vocab, context), params)).result(TIMEOUT_S)
        while not leaver.call(lambda: all(sequence.computed >= context for sequence in leaver.scheduler.sequences)).result():
            time.sleep(POLL_S)
        leaver.drain().result(TIMEOUT_S)
        departure = Departure(leaver, HOST, SECRET, DIGEST)
        (ticket,) = leaver.call(departure.tickets).result(TIMEOUT_S).values()
        leaver.resume().result(TIMEOUT_S)
        assert ticket is not None
        tickets.append((ticket._replace(positions=context), departure))
    return tickets


def fetcher_of(taker: AttentionLoop) -> KVFetcher:
    assert taker.moving_in is not None
    return taker.moving_in.fetcher


def expected(taker: AttentionLoop, ticket: KVTicket) -> Prospect:
    moving_in = taker.moving_in
    assert moving_in is not None
    return taker.call(lambda: moving_in.prospect(ticket, taker.costs)).result(TIMEOUT_S)


def fetched_ms(fetcher: KVFetcher, ticket: KVTicket, like: PagedCache) -> float:
    """Into blocks of a cache of its own."""
    blocks = -(-ticket.positions // like.block_size)
    cache = PagedCache(
        layers=like.layers, num_blocks=blocks, block_size=like.block_size, head_dim=like.head_dim, dtype=like.dtype
    )
    ended, failures = threading.Event(), list[str]()

    def done(_duration_s: float, failure: str) -> None:
        failures.append(failure)
        ended.set()

    started_s = time.monotonic()
    layers = cache.spans(list(range(blocks)), ticket.positions)
    fetcher.fetch(ticket, ticket.positions, ticket.positions * cache.token_bytes, layers, done)
    assert ended.wait(TIMEOUT_S)
    assert failures == [""], failures
    return (time.monotonic() - started_s) * 1000


def computed_again_ms(cluster: LocalCluster, context: int, repeat: int) -> float:
    """From when a request with so many tokens comes to its next token."""
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    took_ms = []
    for number in range(repeat):
        tokens = prompt(cluster.config.vocab_size, context)
        request = Request(f"computed-{context}-{number}", tokens[:-1], params)
        started_s = time.monotonic()
        cluster.attention[1].submit(request, tokens[-1:]).result(TIMEOUT_S)
        cluster.collect([request.id], TIMEOUT_S)
        took_ms.append((time.monotonic() - started_s) * 1000)
    return median(took_ms)


def prompt(vocab: int, tokens: int) -> tuple[int, ...]:
    return tuple(random.Random(tokens).choices(range(vocab), k=tokens))


def copy_rate() -> float:
    """Bytes a second of a plain copy, out of the caches' reach."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    took_s = []
    for _ in range(5):
        started_s = time.monotonic()
        target.copy_(source)
        took_s.append(time.monotonic() - started_s)
    return COPIED_BYTES / median(took_s)


if __name__ == "__main__":
    sys.exit(main())
