"""Run on one host: which ports of others take a connection, and what they answer to somebody who has no credentials."""

import argparse
import asyncio
import http.client
import json
import socket
from collections.abc import Iterable

import grpc

AT_ONCE = 400
TIMEOUT_S = 5.0
PORTS = range(1, 65_536)
PATHS = ("/", "/metrics", "/v1/models", "/admin/status", "/api/serve/applications/", "/api/cluster_status")
CALLS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetResourceLoad",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.rpc.LogService/ListLogs",
    "/ray.rpc.ObjectManagerService/FreeObjects",
    "/ray.rpc.RayletDriver/ClusterInfo",
    "/ray.serve.ASGIService/HandleRequest",
    "/afd.TokenStream/Attach",
)
"""With an empty message: what asks for credentials refuses it before it looks at that."""
NO_SUCH_CALL = "UNIMPLEMENTED"


async def open_ports(address: str, ports: Iterable[int] = PORTS) -> list[int]:
    """Those that take a TCP connection."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def takes(port: int) -> int | None:
        async with turns:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    _, writer = await asyncio.open_connection(address, port)
            except (OSError, TimeoutError):
                return None
            writer.transport.abort()
            return port

    return [port for port in await asyncio.gather(*map(takes, ports)) if port is not None]


def answers(address: str, port: int) -> dict[str, str]:
    """By what was asked: the HTTP status of a path, the gRPC code of a call; what gets no answer of that kind is left out."""
    heard: dict[str, str] = {}
    for path in PATHS:
        status = _http(address, port, path)
        if status is None:
            break
        heard[path] = status
    for call in CALLS if not heard else ():
        code = _grpc(f"{address}:{port}", call)
        if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            break
        if code != NO_SUCH_CALL:
            heard[call] = code
    return heard


def _http(address: str, port: int, path: str) -> str | None:
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _grpc(target: str, call: str) -> str:
    with grpc.insecure_channel(target, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(call)(b"", timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"


def scan(address: str) -> dict[int, dict[str, str]]:
    return {port: answers(address, port) for port in asyncio.run(open_ports(address))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("addresses", nargs="+")
    socket.setdefaulttimeout(TIMEOUT_S)
    print(json.dumps({address: scan(address) for address in parser.parse_args().addresses}))


if __name__ == "__main__":
    main()
