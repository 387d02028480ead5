"""Ingress: the Ray Serve deployment that speaks HTTP to clients and token streams to the attention actors."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.schema import LoggingConfig

from actors.attention_pool import AttentionPool
from actors.http.app import Options, create_app
from actors.http.auth import Keys
from actors.http.backend import ModelCard, Rejected, Unavailable
from actors.http.metrics import IngressMetrics, Snapshot
from actors.token_stream import TokenStreamClient
from afd_ray.request import Request, TokenOutput
from afd_ray.text import Tokenizer

logger = logging.getLogger(__name__)

CONTROLLER_NAME = "afd-controller"
NAMESPACE = "afd"
RETRY_S = 0.5
SHARE_METRICS_S = 5.0

# One event loop for the replica and our code: a hop between threads less for each request and each token.
SERVE_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
ROOM_FOR_RUNNING_REQUESTS = 65_536
"""Our own queue limit decides, not Serve's."""


class ClusterBackend:
    """The cluster as the HTTP interface sees it. `follow` keeps the view of it fresh."""

    def __init__(self, find_controller: Callable[[], Any], *, ingress_id: str, max_queued: int) -> None:
        """`find_controller` gives the controller's handle, or raises ValueError while there is none."""
        self._find_controller = find_controller
        self._ingress_id = ingress_id
        self._pool = AttentionPool(self._connect, max_queued=max_queued)
        self._controller: Any = None
        self._card: ModelCard | None = None
        self._secret = b""
        self._state = "starting"
        self._seen: tuple[int, str] = (-1, "starting")
        self._change: asyncio.Task[Any] | None = None

    @property
    def model(self) -> ModelCard:
        if self._card is None:
            raise Unavailable("the cluster is starting")
        return self._card

    def ready(self) -> bool:
        return self._card is not None and self._state in ("ready", "resizing", "recovering") and self._pool.live > 0

    def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        return self._pool.generate(request)

    async def status(self) -> dict[str, Any]:
        return dict(await self.ask("status"))

    async def scale(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return dict(await self.ask("scale", **wanted))

    async def rebalance(self) -> dict[str, Any]:
        return dict(await self.ask("rebalance"))

    async def trace(self, steps: int) -> dict[str, Any]:
        return dict(await self.ask("trace", steps))

    async def metrics(self) -> dict[str, float]:
        gauges = {"ready": float(self.ready())}
        try:
            return gauges | cluster_gauges(await self.status())
        except Unavailable:
            return gauges

    async def ask(self, method: str, *args: Any, **named: Any) -> Any:
        """A controller method's answer; ValueError and Rejected tell what it said, a controller that is gone is Unavailable."""
        if self._controller is None:
            try:
                self._controller = self._find_controller()
            except ValueError as error:
                raise Unavailable(f"no controller: {_line(error)}") from None
        try:
            return await getattr(self._controller, method).remote(*args, **named)
        except RayTaskError as error:
            line = _line(error.cause)
            raise (ValueError(line) if isinstance(error.cause, ValueError) else Rejected(line)) from None
        except RayActorError as error:
            self._controller = None
            raise Unavailable(f"the controller does not answer: {_line(error)}") from None

    async def refresh(self) -> list[str]:
        """Takes the cluster's present view; tells which attention actors could not be reached."""
        view = await self.ask("ingress_view")
        self._secret = view["secret"]
        if self._card is None:
            self._card = await asyncio.to_thread(model_card, view["model"])
        failures = await self._pool.follow({actor["id"]: actor["address"] for actor in view["attention"]})
        self._state = view["state"]
        self._seen = (view["epoch"], view["state"])
        return failures

    async def follow(self) -> None:
        """Refreshes the view whenever the cluster changes or a stream breaks; runs until cancelled."""
        while True:
            try:
                failures = await self.refresh()
                for line in failures:
                    logger.warning("attention actor %s", line)
                await self._until_stale(RETRY_S if failures else None)
            except (RuntimeError, RayError, OSError, ValueError) as error:
                logger.warning("cluster view: %s", error)
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        if self._change is not None:
            self._change.cancel()
        await self._pool.close()

    async def _until_stale(self, timeout_s: float | None) -> None:
        # A question still open is kept, not asked anew: the controller would collect abandoned ones.
        if self._change is None:
            self._change = asyncio.create_task(self.ask("changed", *self._seen))
        broken = asyncio.create_task(self._pool.broken.wait())
        await asyncio.wait((self._change, broken), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        broken.cancel()
        if self._change.done():
            change, self._change = self._change, None
            change.result()

    async def _connect(self, address: str) -> TokenStreamClient:
        return await TokenStreamClient.connect(address, secret=self._secret, ingress_id=self._ingress_id)


def model_card(model: dict[str, Any]) -> ModelCard:
    """From the controller's view; reads the tokenizer files."""
    tokenizer = Tokenizer.from_directory(Path(model["directory"]))
    return ModelCard(model["name"], model["max_context"], model["vocab_size"], tokenizer, created=int(time.time()))


def cluster_gauges(status: dict[str, Any]) -> dict[str, float]:
    """What `/metrics` tells of the cluster, summed over the attention actors."""
    names = {
        "running": "requests_running",
        "waiting": "requests_waiting",
        "kv_used": "kv_blocks_used",
        "kv_total": "kv_blocks_total",
    }
    sums = {gauge: float(sum(actor.get(key) or 0 for actor in status["attention"])) for key, gauge in names.items()}
    actors = {
        f"{role}_actors": float(sum(actor["state"] == "running" for actor in status[role])) for role in ("attention", "ffn")
    }
    return {**sums, **actors, "epoch": float(status["epoch"])}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@serve.ingress()
class Ingress:
    """One replica. `server`: the configuration's server section, as a dict."""

    async def __init__(self, controller_name: str, server: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._server = server
        self._id = f"ingress-{uuid.uuid4().hex[:8]}"
        self._metrics = IngressMetrics()
        max_queued = -(-server["max_queued_requests"] // server["replicas"])
        find = partial(ray.get_actor, controller_name, namespace=NAMESPACE)
        self._backend = ClusterBackend(find, ingress_id=self._id, max_queued=max_queued)
        self._tasks = [asyncio.create_task(self._backend.follow())]
        if server["replicas"] > 1:
            self._tasks.append(asyncio.create_task(self._share_metrics()))

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = Options(
            api_keys=Keys.from_file(self._server["api_keys_file"]),
            admin_keys=Keys.from_file(self._server["admin_keys_file"]),
            max_body_bytes=self._server["max_body_bytes"],
            replica=self._id,
            peer_snapshots=self._peer_snapshots,
        )
        return create_app(self._backend, options, self._metrics)

    async def refresh(self) -> list[str]:
        """Looks at the cluster again, at once."""
        return await self._backend.refresh()

    async def _peer_snapshots(self) -> dict[str, Snapshot]:
        if self._server["replicas"] == 1:
            return {}
        return dict(await self._backend.ask("exchange_metrics", self._id, self._metrics.snapshot()))

    async def _share_metrics(self) -> None:
        """So that a scrape of another replica sees this one."""
        while True:
            await asyncio.sleep(SHARE_METRICS_S)
            try:
                await self._peer_snapshots()
            except (RuntimeError, RayError, ValueError) as error:
                logger.warning("metrics not shared: %s", error)

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._backend.close()


def build(controller_name: str, server: dict[str, Any]) -> serve.Application:
    """The Serve application of a cluster whose controller runs, or will run, under this name.

    Raises ValueError (one line) for keys files that are missing or empty: a replica could only fail later, and at length.
    """
    server = {
        **server,
        "api_keys_file": _keys_path(server["api_keys_file"]),
        "admin_keys_file": _keys_path(server["admin_keys_file"]),
    }
    options = {
        "num_replicas": server["replicas"],
        "max_ongoing_requests": server["max_queued_requests"] + ROOM_FOR_RUNNING_REQUESTS,
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": SERVE_ENVIRONMENT}},
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 5.0,
        "logging_config": LoggingConfig(enable_access_log=False, log_level="WARNING"),
    }
    deployment: serve.Deployment = serve.deployment(name="ingress", **options)(Ingress)
    return deployment.bind(controller_name, server)


def _keys_path(path: str | None) -> str | None:
    """Absolute: a replica has another working directory."""
    Keys.from_file(path)
    return None if path is None else str(Path(path).absolute())


def app(args: dict[str, str]) -> serve.Application:
    """`serve run actors.ingress:app config=FILE [key.path=value ...]`: starts the cluster when none runs, and serves it."""
    # Imported here: a replica imports this module, and needs neither the engine nor torch.
    from actors.cluster import create_controller
    from afd_ray.config import check_supported, load_config

    overrides = [f"{key}={value}" for key, value in args.items() if key != "config"]
    config = load_config(args.get("config"), overrides)
    check_supported(config)
    try:
        controller = ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    except ValueError:
        controller = create_controller(config, CONTROLLER_NAME, detached=True)
    ray.get(controller.start.remote())
    return build(CONTROLLER_NAME, config.server.model_dump())
