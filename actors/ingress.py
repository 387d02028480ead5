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
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from actors.cluster_view import ANSWER_TIMEOUT_S, ClusterView
from actors.heap import freeze_heap
from actors.http.app import Options, create_app
from actors.http.auth import Keys
from actors.http.backend import STOPPING, ModelCard, Unavailable
from actors.http.limits import RequestRate
from actors.http.metrics import IngressMetrics, Snapshot
from actors.request_log import log_requests
from afd_ray.config import Config, ConfigError, Server, check_supported, load_config, model_directory
from afd_ray.config_reading import overrides_of
from afd_ray.metrics import READY, STALE_EPOCH_TOKENS, Sample
from afd_ray.request import Request, TokenOutput
from afd_ray.text import Tokenizer
from placement.groups import ON_HEAD

logger = logging.getLogger(__name__)

CONTROLLER_NAME = "afd-controller"
NAMESPACE = "afd"
SHARE_METRICS_S = 5.0
STATUS_TIMEOUT_S = 35.0
"""Longer than the controller waits for its actors."""

# One event loop for the replica and our code: a hop between threads less for each request and each token.
SERVE_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
ROOM_FOR_RUNNING_REQUESTS = 65_536
"""Our own queue limit decides, not Serve's."""
# A replica that died is noticed, and replaced, after a period; one that is only silent after three timeouts.
HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 5.0


class ClusterBackend:
    """The cluster as the HTTP interface sees it. `follow` keeps the view of it fresh."""

    def __init__(
        self,
        find_controller: Callable[[], Any],
        *,
        ingress_id: str,
        max_queued: int,
        patience_s: float | None = None,
        on_moved: Callable[[], None] = lambda: None,
    ) -> None:
        """As ClusterView."""
        self._view = ClusterView(
            find_controller, client_id=ingress_id, max_queued=max_queued, patience_s=patience_s, on_moved=on_moved
        )
        self._card: ModelCard | None = None
        self._draining = False

    @property
    def model(self) -> ModelCard:
        if self._card is None:
            raise Unavailable("the cluster is starting")
        return self._card

    def ready(self) -> bool:
        """Of a controller that does not answer, the last word counts."""
        serving = self._view.state in ("ready", "resizing", "recovering")
        return serving and self._card is not None and self._view.pool.live > 0 and not self.stopping

    @property
    def stopping(self) -> bool:
        return self._draining or self._view.state == "stopping"

    def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        self._require_no_end()
        return self._view.pool.generate(request)

    async def status(self) -> dict[str, Any]:
        """The cluster's; one that takes no request any more is stopping, whatever its actors do."""
        status = dict(await self._view.ask("status", timeout_s=STATUS_TIMEOUT_S))
        return status | {"state": "stopping"} if self._draining else status

    async def scale(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if not wanted.get("cancel"):
            self._require_no_end()
        return dict(await self._view.ask("scale", named=wanted))

    async def decisions(self, after: int) -> dict[str, Any]:
        return dict(await self._view.ask("decisions", after, timeout_s=ANSWER_TIMEOUT_S))

    async def measured(self) -> dict[str, Any]:
        return dict(await self._view.ask("measured", timeout_s=ANSWER_TIMEOUT_S))

    async def rebalance(self) -> dict[str, Any]:
        self._require_no_end()
        return dict(await self._view.ask("rebalance"))

    async def trace(self, steps: int) -> dict[str, Any]:
        return dict(await self._view.ask("trace", steps))

    async def exchange_metrics(self, ingress_id: str, snapshot: Snapshot) -> dict[str, Snapshot]:
        return dict(await self._view.ask("exchange_metrics", ingress_id, snapshot, timeout_s=ANSWER_TIMEOUT_S))

    async def metrics(self) -> list[Sample]:
        own = [Sample(READY.name, {}, self.ready()), Sample(STALE_EPOCH_TOKENS.name, {}, self._view.pool.succession.stale)]
        try:
            return own + list(await self._view.ask("metrics", timeout_s=STATUS_TIMEOUT_S))
        except Unavailable:
            return own

    async def refresh(self) -> list[str]:
        """Takes the cluster's present view; tells which attention actors could not be reached."""
        await self._take_model(await self._view.refresh())
        return await self._view.pool.settle()

    async def follow(self) -> None:
        """Refreshes the view whenever the cluster changes; runs until cancelled."""
        await self._view.follow(self._take_model)

    def drain(self) -> None:
        """Take no new request from now on; those in progress go on."""
        self._draining = True

    def stop_all(self) -> None:
        """End every request in progress, with an error that its client can read."""
        self._view.pool.stop_all(STOPPING)

    async def close(self) -> None:
        await self._view.pool.close()

    def _require_no_end(self) -> None:
        """Raises Unavailable for what would begin anew on a server that comes to its end."""
        if self._draining:
            raise Unavailable(STOPPING)

    async def _take_model(self, view: dict[str, Any]) -> None:
        if self._card is None:
            self._card = await asyncio.to_thread(model_card, view["model"])


def model_card(model: dict[str, Any]) -> ModelCard:
    """From the controller's view; reads the tokenizer files."""
    tokenizer = Tokenizer.from_directory(Path(model["directory"]))
    return ModelCard(model["name"], model["max_context"], model["vocab_size"], tokenizer, created=int(time.time()))


@serve.ingress()
class Ingress:
    """One replica. `server`, `failure`: these sections of the configuration, as dicts."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, controller_name: str, server: dict[str, Any], failure: dict[str, Any]
    ) -> None:
        log_requests()
        self._server, self._failure = server, failure
        self._id = f"ingress-{uuid.uuid4().hex[:8]}"
        self._metrics = IngressMetrics()
        max_queued = -(-server["max_queued_requests"] // server["replicas"])
        find = partial(ray.get_actor, controller_name, namespace=NAMESPACE)
        self._backend = ClusterBackend(
            find,
            ingress_id=self._id,
            max_queued=max_queued,
            patience_s=failure["request_timeout_s"],
            on_moved=self._metrics.request_moved,
        )
        self._tasks = [asyncio.create_task(self._backend.follow())]
        if server["replicas"] > 1:
            self._tasks.append(asyncio.create_task(self._share_metrics()))
        freeze_heap()

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = Options(
            api_keys=Keys.from_file(self._server["api_keys_file"]),
            admin_keys=Keys.from_file(self._server["admin_keys_file"]),
            rate=RequestRate(_share(self._server["max_requests_per_s"], self._server["replicas"])),
            max_header_bytes=self._server["max_header_bytes"],
            max_body_bytes=self._server["max_body_bytes"],
            replica=self._id,
            peer_snapshots=self._peer_snapshots,
            request_timeout_s=self._failure["request_timeout_s"],
        )
        return create_app(self._backend, options, self._metrics)

    async def refresh(self) -> list[str]:
        """Looks at the cluster again, at once."""
        return await self._backend.refresh()

    async def drain(self, at_once: bool = False) -> int:
        """Takes no new request from now on; gives how many are still in progress. `at_once`: ends those too, with an error."""
        self._backend.drain()
        if at_once:
            self._backend.stop_all()
        return self._metrics.in_flight

    async def _peer_snapshots(self) -> dict[str, Snapshot]:
        if self._server["replicas"] == 1:
            return {}
        return await self._backend.exchange_metrics(self._id, self._metrics.snapshot())

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


def build(controller_name: str, config: Config) -> serve.Application:
    """The Serve application of a cluster whose controller runs, or will run, under this name.

    Raises ValueError (one line) for keys files that are missing or empty: a replica could only fail later, and at length.
    """
    server = config.server.model_dump() | {
        "api_keys_file": _keys_path(config.server.api_keys_file),
        "admin_keys_file": _keys_path(config.server.admin_keys_file),
    }
    # Several replicas are spread: no single host is to take all of them along.
    where = ON_HEAD if server["replicas"] == 1 else {}
    options = {
        "num_replicas": server["replicas"],
        "max_ongoing_requests": server["max_queued_requests"] + ROOM_FOR_RUNNING_REQUESTS,
        "ray_actor_options": {"num_cpus": 0, "resources": where, "runtime_env": {"env_vars": SERVE_ENVIRONMENT}},
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": config.failure.drain_timeout_s,
        "logging_config": LoggingConfig(enable_access_log=False, log_level="WARNING"),
    }
    deployment: serve.Deployment = serve.deployment(name="ingress", **options)(Ingress)
    return deployment.bind(controller_name, server, config.failure.model_dump())


def _share(rate: float | None, replicas: int) -> float | None:
    """Of one replica: requests are dealt to all of them alike."""
    return None if rate is None else rate / replicas


def _keys_path(path: str | None) -> str | None:
    """Absolute: a replica has another working directory."""
    Keys.from_file(path)
    return None if path is None else str(Path(path).expanduser().absolute())


def app(args: dict[str, str]) -> serve.Application:
    """`serve run actors.ingress:app config=FILE [key.path=value ...]`: starts the cluster when none runs, and serves it.

    Raises RayServeException (one line), which Serve shows as it is: what else a builder raises it tries three times more, and shows with its traceback.
    """
    try:
        return _application(args)
    except (ValueError, RuntimeError, OSError) as error:
        raise RayServeException(" ".join(str(error).split())) from error


def _application(args: dict[str, str]) -> serve.Application:
    # Imported here: a replica imports this module, and needs neither the engine nor torch.
    from actors.cluster import ClusterError, create_controller
    from actors.fit import check_fits
    from actors.roster import first_line
    from afd_ray.models.checkpoint import Checkpoint

    config = load_config(args.get("config"), overrides_of(args))
    check_supported(config)
    check_port(config.server.port, _serve_port())
    check_fits(config, Checkpoint.open(model_directory(config.model)))
    try:
        controller = ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    except ValueError:
        controller = create_controller(config, CONTROLLER_NAME, detached=True)
    else:
        running: Any = ray.get(controller.configuration.remote())
        check_same_cluster(running, config)
    try:
        ray.get(controller.start.remote())
    except RayError as error:
        ray.kill(controller)  # nothing is left of what it began, and the next one may have another configuration
        raise ClusterError(first_line(error)) from None
    return build(CONTROLLER_NAME, config)


def _serve_port() -> int:
    """Where Serve listens; where `serve run` will have it listen, if it does not run yet."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return int((client.http_config if client else HTTPOptions()).port)


def check_port(wanted: int, serves: int) -> None:
    """Raises ConfigError (one line) for a `server.port` that was given and is not Serve's: no application moves it."""
    if wanted not in (serves, Server().port):
        raise ConfigError(
            f"server.port: {wanted} is not where Serve listens, {serves}: leave it out, and give http_options.port in the file of "
            "serve deploy or serve run"
        )


def check_same_cluster(running: Config, wanted: Config) -> None:
    """Raises ConfigError (one line) unless all but `server` is as the cluster was started with: that alone is the ingress' own."""
    for section in type(wanted).model_fields:
        before, after = getattr(running, section).model_dump(), getattr(wanted, section).model_dump()
        if section == "server" or before == after:
            continue
        key = next(key for key in after if before[key] != after[key])
        raise ConfigError(
            f"{section}.{key}: {after[key]} is not what the running cluster was started with, {before[key]}: resize it with afd-ray scale, "
            "or end it with its Ray"
        )
