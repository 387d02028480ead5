"""Cluster: the composition root of a disaggregated cluster, and its Python API."""

import asyncio
import math
import os
import random
import reprlib
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import ray

from actors.cluster_view import ClusterView
from actors.controller import NAME, NAMESPACE, Controller
from actors.fit import check_fits
from actors.http.backend import Unavailable
from actors.roster import first_line
from afd_ray.config import Config, check_supported, load_config, model_directory
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.request import FinishReason, Request, SamplingParams, TokenOutput
from afd_ray.text import IncrementalDetokenizer, Tokenizer
from placement.groups import ON_HEAD

T = TypeVar("T")
PROGRESS_PERIOD_S = 0.25


class ClusterError(RuntimeError):
    """The cluster could not do what was asked; the message is one line."""


class Generation(NamedTuple):
    """One prompt's continuation."""

    text: str
    """Empty for a model without a tokenizer."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    outputs: tuple[TokenOutput, ...]
    """A token each, with logprobs where they were asked for."""
    times_s: tuple[float, ...]
    """When each token arrived here, seconds since its request was submitted: the first is TTFT, the gaps are TPOT."""


class Cluster:
    """Attention and FFN actors in a Ray cluster; `with Cluster.start(config) as c: c.generate(...)`."""

    def __init__(self, config: Config, controller: Any, owns_ray: bool) -> None:
        self.config = config
        self.controller = controller
        self._owns_ray = owns_ray
        self._tokenizer = Tokenizer.from_directory(model_directory(config.model))
        self._events = _EventLoop()
        self._view = ClusterView(
            lambda: self.controller,
            client_id=f"py-{uuid.uuid4().hex[:8]}",
            patience_s=config.failure.request_timeout_s,
        )
        self._following: asyncio.Task[None] | None = None
        self._starting: Any = None
        """The bring-up, until it has answered."""

    @classmethod
    def start(
        cls, config: Config | None = None, *, name: str = NAME, on_progress: Callable[[str], None] = lambda doing: None
    ) -> "Cluster":
        """Bring a cluster up, in the Ray cluster this process is connected to or else in one of its own.

        `on_progress` is told several times a second what is being done; what it raises ends the bring-up, and nothing is left.

        Raises ConfigError or CheckpointError for what is wrong with the input, ClusterError (one line) when the bring-up fails.
        """
        config = config or load_config()
        check_supported(config)
        check_fits(config, Checkpoint.open(model_directory(config.model)))
        owns_ray = not ray.is_initialized()
        if owns_ray:
            on_progress("starting Ray")
            start_ray(config)
        cluster = None
        try:
            controller = create_controller(config, name)
            cluster = cls(config, controller, owns_ray)
            cluster._await_start(on_progress)
        except BaseException:
            if cluster is not None:
                cluster.shutdown()
            elif owns_ray:
                ray.shutdown()
            raise
        return cluster

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        concurrency: int | None = None,
        timeout_s: float = 600.0,
    ) -> list[Generation]:
        """Continue every prompt (text, or token ids), `concurrency` at a time (None: all at once); in the order of the prompts.

        Raises ValueError (one line) for a prompt or parameter that cannot be served, ClusterError when an actor fails.
        """
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if isinstance(prompts, str) or len(each) != len(prompts):
            raise ValueError(f"prompts must be a list, with as many params as prompts, got {len(prompts)} and {len(each)}")
        requests = [
            Request(f"py-{uuid.uuid4().hex}", self._encode(prompt), _seeded(one))
            for prompt, one in zip(prompts, each, strict=True)
        ]
        return self._events.run(self._generate_all(requests, concurrency or len(requests)), timeout_s)

    def status(self) -> dict[str, Any]:
        """As `afd-ray status --json`."""
        return dict(ray.get(self.controller.status.remote()))

    def state(self) -> tuple[int, str]:
        """Number of the epoch, and the cluster's state."""
        view = ray.get(self.controller.ingress_view.remote())
        return view["epoch"], view["state"]

    def losses(self) -> list[str]:
        """Which actors died in the last minute and why, a line each."""
        status = self.status()
        actors = [*status["attention"], *status["ffn"]]
        return [f"{actor['id']} is lost: {actor['reason']}" for actor in actors if actor["state"] == "dead"]

    def measured(self) -> dict[str, Any]:
        """As `GET /admin/measured`: what the attention actors have measured since their start. Raises ClusterError while they cannot all be asked."""
        return dict(self._call(self.controller.measured.remote()))

    def decisions(self, after: int = 0) -> list[dict[str, Any]]:
        """As `GET /admin/decisions`: what the autoscaler decided, those with a higher number, oldest first."""
        return list(ray.get(self.controller.decisions.remote(after))["decisions"])

    def trace(self, steps: int) -> dict[str, Any]:
        """Chrome trace of the next `steps` steps of every actor."""
        return dict(ray.get(self.controller.trace.remote(steps)))

    def scale(
        self,
        attention: int | None = None,
        ffn: int | None = None,
        *,
        ffn_tensor_parallel: int | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Resize the pools while they serve; None: as it is. `ffn` counts ranks. Gives `last_resize` of the status, once that is over.

        Its `outcome` is "committed" or "rolled_back", with the `reason`. Raises ClusterError for counts that cannot be and while
        another resize is in progress.
        """
        return dict(self._call(self.controller.scale.remote(attention, ffn, ffn_tensor_parallel, timeout_s)))

    def reshape(
        self, attention: int, *, tensor_parallel: int = 1, expert_parallel: int = 1, micro_batches: int | None = None
    ) -> None:
        """Form an epoch of another shape while serving; keeps the actors that fit. Raises ClusterError when it was rolled back."""
        self._call(self.controller.reshape.remote(attention, tensor_parallel, expert_parallel, micro_batches))

    def rebalance(self) -> list[list[int]]:
        """Place the experts anew by how often each was chosen, while serving; gives what each FFN instance holds.

        Raises ClusterError, also when no request has chosen an expert yet.
        """
        return [list(held) for held in self._call(self.controller.rebalance.remote())["experts"]]

    def check_integrity(self) -> list[str]:
        """What is wrong with KV blocks or streams, a line each."""
        return list(ray.get(self.controller.check_integrity.remote()))

    def shutdown(self) -> None:
        """Stop every actor, give the resources back; and Ray, where `start` started it. Harmless when repeated."""
        try:
            self._events.run(self._let_go(), 10)
            ray.get(self.controller.shutdown.remote(), timeout=30)
            if self._starting is not None:
                ray.get(self._starting, timeout=30)  # Ray prints an error that nobody fetched
        except (ray.exceptions.RayError, RuntimeError, TimeoutError):
            pass  # what is gone already needs no stopping
        finally:
            self._events.close()
            if ray.is_initialized():
                ray.kill(self.controller)
            if self._owns_ray:
                ray.shutdown()

    def _await_start(self, on_progress: Callable[[str], None]) -> None:
        self._starting = self.controller.start.remote()
        while not ray.wait([self._starting], timeout=PROGRESS_PERIOD_S)[0]:
            on_progress(ray.get(self.controller.progress.remote()))
        answered, self._starting = self._starting, None
        self._call(answered)

    def _call(self, pending: Any) -> Any:
        try:
            return ray.get(pending)
        except ray.exceptions.RayError as error:
            raise ClusterError(first_line(error)) from error

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            if not isinstance(prompt, Sequence) or not all(type(token) is int for token in prompt):
                raise ValueError(f"prompt must be text or a list of token ids, got {reprlib.repr(prompt)}")
            return tuple(int(token) for token in prompt)
        if self._tokenizer is None:
            raise ValueError("prompt must be token ids, got text: the model has no tokenizer")
        return tuple(self._tokenizer.encode(prompt))

    async def _generate_all(self, requests: list[Request], concurrency: int) -> list[Generation]:
        view = await self._look()
        for request in requests:
            _check_prompt(request, view["model"]["vocab_size"], view["model"]["max_context"])
        room = asyncio.Semaphore(max(1, concurrency))

        async def one(request: Request) -> Generation:
            async with room:
                return await self._in_time(self._generate_one(request))

        return list(await asyncio.gather(*map(one, requests)))

    async def _look(self) -> dict[str, Any]:
        """The cluster's view, or the last one while no controller answers; kept fresh from now on.

        Raises ClusterError when no attention actor can be reached.
        """
        pool = self._view.pool
        try:
            view = await self._view.refresh()
        except Unavailable as error:
            if self._view.latest is None:
                raise ClusterError(str(error)) from None
            view = self._view.latest
        failures = await pool.settle()
        if not pool.live:
            raise ClusterError("; ".join(failures) or f"no attention actor is running: the cluster is {view['state']}")
        if self._following is None:
            self._following = asyncio.create_task(self._view.follow())
        return view

    async def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        limit_s = self.config.failure.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await work
        except TimeoutError:
            raise ClusterError(f"a request was not over in failure.request_timeout_s, {limit_s} s") from None
        except Unavailable as error:
            raise ClusterError(str(error)) from None

    async def _let_go(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._view.pool.close()

    async def _generate_one(self, request: Request) -> Generation:
        outputs: list[TokenOutput] = []
        times_s: list[float] = []
        submitted_s = time.perf_counter()
        detokenizer = IncrementalDetokenizer(self._tokenizer, request.params.stop) if self._tokenizer else None
        text = ""
        reason: FinishReason = "length"
        async with aclosing(self._view.pool.generate(request)) as stream:
            async for output in stream:
                if output.finish_reason == "error":
                    raise ClusterError(output.error or "the engine failed")
                reason = output.finish_reason or reason
                if output.token_id is not None:
                    outputs.append(output)
                    times_s.append(time.perf_counter() - submitted_s)
                # The token that ended a request is not part of its text.
                if detokenizer is not None and output.token_id is not None and reason != "stop":
                    text += detokenizer.feed(output.token_id)
                    if detokenizer.stopped:
                        reason = "stop"
                        break
        text += detokenizer.flush() if detokenizer else ""
        token_ids = tuple(output.token_id for output in outputs if output.token_id is not None)
        return Generation(text, token_ids, reason, tuple(outputs), tuple(times_s))


class _EventLoop:
    """An asyncio loop in a thread of its own, for the blocking API."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if not self._thread.is_alive():
            work.close()
            raise RuntimeError("the cluster is shut down")
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result(timeout_s)
        except TimeoutError:
            running.cancel()  # what it asked for is aborted, not left running
            raise TimeoutError(f"not over in {timeout_s:g} s") from None

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


def start_ray(config: Config) -> None:
    """A Ray of our own, with logical CPUs enough for the largest shape that autoscaling may choose; ingress and controller take none.

    Raises ClusterError (one line) when it does not come up.
    """
    most = config.autoscaling.max
    attention = max(most.attention, config.attention.replicas)
    ffn = 0 if config.ffn.colocated else max(most.ffn, config.ffn.ranks)
    cpus = attention * config.attention.num_cpus + ffn * config.ffn.num_cpus
    # Ray gives its workers a low priority by default: the step loops would lose to any other process of the host.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # "local": without it Ray would join whatever cluster RAY_ADDRESS or an earlier `ray start` on this machine names.
    try:
        ray.init(
            address="local",
            num_cpus=max(1, math.ceil(cpus)),
            include_dashboard=False,
            log_to_driver=False,
            namespace=NAMESPACE,
            configure_logging=False,
        )
    except Exception as error:  # Ray raises bare ones too
        raise ClusterError(f"Ray did not start: {first_line(error)}") from error


def create_controller(config: Config, name: str = NAME, *, detached: bool = False) -> Any:
    """The controller actor, new; raises ClusterError when one of that name lives. `detached`: it outlives this process."""
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "resources": ON_HEAD,
        "max_concurrency": 1000,
        "max_restarts": -1,
    }
    lifetime = "detached" if detached else None
    try:
        return ray.remote(Controller).options(**options, lifetime=lifetime).remote(config, name)
    except ValueError as error:
        raise ClusterError(
            f"a controller named {name} is running already in this Ray cluster, which holds one at a time: resize it with afd-ray scale, "
            "or end what started it (afd-ray serve, or its Ray after a serve deploy) and begin anew"
        ) from error


def _seeded(params: SamplingParams) -> SamplingParams:
    return params if params.seed is not None else replace(params, seed=random.getrandbits(63))


def _check_prompt(request: Request, vocab_size: int, max_context: int) -> None:
    ids = request.prompt_token_ids
    if not ids:
        raise ValueError("prompt must hold at least 1 token, got 0")
    if len(ids) >= max_context:
        raise ValueError(f"prompt must leave room for a token in the context of {max_context} tokens, got {len(ids)} tokens")
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(f"prompt token ids must be from 0 to {vocab_size - 1}, got {outside}")
