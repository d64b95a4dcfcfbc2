"""Ray, as far as a job needs it: started on this machine or joined, and quiet."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ssm_interp.errors import JobError
from ssm_interp.jobs.job import Where

SECONDS = 5.0
"""How long a cluster may take to answer."""
PORTS = {"ray": 10001, "": 6379}
"""Where Ray listens if an address names no port: for clients (ray://), and for drivers on one of its machines."""
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = 4
"""The kind of frame with which a server of HTTP/2, and so of gRPC, answers."""


@contextmanager
def connected(where: Where) -> Iterator[ModuleType]:
    """Ray, with room for the workers: started on this machine, or joined where it runs; left, or ended, on the way out.

    A Ray that the user has started in this process is used, and left as it is.

    Raises:
        JobError: Ray is not installed; nothing answers at the address; this process is connected to another cluster;
            more GPUs are asked for than this machine has.
    """
    try:
        import ray
    except ImportError:
        raise JobError(
            "workers are run by Ray, which is not installed: pip install 'ssm-interp[cluster]', or leave out workers "
            "to compute in this process"
        ) from None
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if where.address not in (None, "auto", joined):
            raise JobError(
                f"this process is connected to the Ray cluster {joined}, and not to {where.address}; call "
                "ray.shutdown() first, or leave out the address"
            )
        yield ray
        return
    with _sigterm_kept():
        _start(ray, where) if where.address is None else _join(ray, where.address)
        try:
            if where.address is None:
                _check_gpus(ray, where)
            yield ray
        finally:
            ray.shutdown()


def _start(ray: ModuleType, where: Where) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _init(ray, address="local", num_cpus=where.workers, include_dashboard=False)


def _join(ray: ModuleType, address: str) -> None:
    _check_answers(_resolved(address), address)
    try:
        _init(ray, address=address)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise JobError(
            f"cannot join the Ray cluster at {address}: {' '.join(str(error).split())[:300]}; if it asks for a token, "
            "set RAY_AUTH_MODE=token here too"
        ) from error


def _check_gpus(ray: ModuleType, where: Where) -> None:
    there, wanted = ray.cluster_resources().get("GPU", 0), where.gpus_per_worker * (where.workers or 0)
    if wanted > there:
        raise JobError(
            f"{where.workers} workers with {where.gpus_per_worker:g} GPUs each take {wanted:g}, and this machine has "
            f"{there:g}; give fewer workers, a smaller gpus_per_worker, or the address of a cluster"
        )


def _resolved(address: str) -> str:
    """Where "auto" leads; ray.init would wait for minutes if the cluster that it once led to is gone."""
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address("auto"))
    except ConnectionError:
        raise JobError(
            "no Ray cluster runs on this machine for the address 'auto' to find; start one (ray start --head), give "
            "the host:port of another one, or leave out the address: the workers are then started on this machine"
        ) from None


def _check_answers(address: str, given: str) -> None:
    """Raise within seconds, where ray.init takes minutes, if no server of Ray answers."""
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":") if ":" in rest else (rest, "", str(PORTS.get(scheme, "")))
    if not port.isdecimal():
        raise JobError(f"the address {given!r} is none of a Ray cluster; give auto, host:port or ray://host:port")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS) as line:
            line.settimeout(SECONDS)
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                line.sendall(HTTP2_HELLO)
                if (answer := line.recv(9))[3:4] != bytes([SETTINGS]):
                    raise OSError(f"what listens there is no server of Ray (it says {answer!r})")
    except OSError as error:
        hint = "" if given == address else f", where {given!r} leads"
        raise JobError(
            f"no Ray cluster answers at {address}{hint}: {error}; is it running (ray status), and reachable from here?"
        ) from error


def _init(ray: ModuleType, **options: object) -> None:
    """Begin quietly: Ray prints the death of a worker on stdout, whatever it is told of logging."""
    internals = ray._private.worker
    listen = getattr(internals, "listen_error_messages", None)
    internals.listen_error_messages = lambda *_: None
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    finally:
        internals.listen_error_messages = listen


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of whatever was there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
