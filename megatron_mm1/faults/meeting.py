"""How the ranks find rank 0 for their heartbeats: it opens a port and leaves its address in the job's store."""

import ipaddress
import json
import os
import resource
import secrets
import socket
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from megatron_mm1.errors import UserError
from megatron_mm1.faults.liveness import Status

_KEY = "heartbeats"
_CONNECT_SECONDS = 60.0


def open_meeting(store: torch.distributed.Store, *, world_size: int, leader: Status) -> tuple[socket.socket, str]:
    """Rank 0's part: (the listening socket, the token that the others show)."""
    _allow_open_files(world_size)
    listener = _listen()
    token = secrets.token_hex(8)
    place = {"address": _own_address(), "port": listener.getsockname()[1], "token": token, "leader": asdict(leader)}
    store.set(_KEY, json.dumps(place))
    return listener, token


def join_meeting(store: torch.distributed.Store) -> tuple[socket.socket, str, Status]:
    """Another rank's part: (connection to rank 0, token, rank 0's status).

    Raises:
        UserError: rank 0 cannot be reached.
    """
    place: dict[str, Any] = json.loads(store.get(_KEY))
    address = place["address"], place["port"]
    try:
        connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot reach rank 0 at {address[0]} port {address[1]} for heartbeats ({error}): "
            "let nodes connect to each other on any port, as NCCL and gloo need too, or set "
            "parallel.heartbeat_timeout_seconds 0"
        ) from error
    return connection, place["token"], Status(**place["leader"])


def _listen() -> socket.socket:
    """A socket on any free port of every interface, IPv6 too where there is any."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # switched off at run time
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=socket.SOMAXCONN)
    return socket.create_server(("", 0), backlog=socket.SOMAXCONN)


def _own_address() -> str:
    """Where other nodes reach this process: at the address from which it reaches the job's store.

    Where the store is on this very machine under a name for the loopback interface, the name may well mean more
    elsewhere, and the others have reached the store by it.
    """
    master, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    family, kind, protocol, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0]
    return master if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own


def _allow_open_files(count: int) -> None:
    """Rank 0 keeps a connection to every rank, as the store does; the usual limit is 1,024 files, and may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
