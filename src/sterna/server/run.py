"""`serve`: from settings to a running server, and from a signal to a clean end.

The socket is bound before the model is loaded: a taken port is known at once, and clients that
connect early wait in the backlog instead of being refused. The first SIGTERM or SIGINT drains:
running requests finish, new ones get 503, /health turns 503. The second one forces.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import importlib
import ipaddress
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sterna.core.errors import ConfigError, PortInUseError
from sterna.core.log import get_logger, setup_logging
from sterna.server.config import ServerConfig

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from sterna.engine.aio import AsyncEngine
    from sterna.engine.embed_aio import AsyncEmbedder

_log = get_logger(__name__)

_BACKLOG = 2048
# Longer than the 60 s that load balancers keep idle connections, so that they close first.
_KEEP_ALIVE_S = 75
# After draining only idle streams (the live page) are left; they are told to end and cut then.
_CLOSE_TIMEOUT_S = 2
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_FORCED = 1


def serve(config: ServerConfig) -> int:
    """Serve until a signal; returns the exit code: 0, or 1 when requests were cut off.

    Raises PortInUseError, ConfigError and ModelError before anything is served.
    """
    setup_logging()
    # uvicorn's warnings (an invalid request line, say) look like ours.
    logging.getLogger("uvicorn").handlers[:] = logging.getLogger("sterna").handlers
    check_tls(config)
    config.keys()
    with bind(config) as listener:
        return serve_on(listener, _load(config), config)


def serve_on(
    listener: socket.socket, engine: AsyncEngine | AsyncEmbedder, config: ServerConfig
) -> int:
    """Serve a loaded engine on a bound socket; returns the exit code."""
    app = make_app(engine, config)
    # What is loaded now stays; the collector need not look at it again (a full pass takes 50 ms).
    gc.collect()
    gc.freeze()
    _log.info("%s", _announcement(listener, app, config))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(listener, app, engine, config))


def make_app(engine: AsyncEngine | AsyncEmbedder, config: ServerConfig) -> FastAPI:
    """The application for an engine of either kind."""
    from sterna.engine.embed_aio import AsyncEmbedder
    from sterna.server.app import create_app
    from sterna.server.embed_app import create_embed_app

    if isinstance(engine, AsyncEmbedder):
        return create_embed_app(engine, config)
    return create_app(engine, config)


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket. PortInUseError when it is taken, ConfigError when it cannot be had."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"host {config.host!r} is no address of this machine: {error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(config, error) from error
    return listener


def check_tls(config: ServerConfig) -> None:
    """ConfigError when the TLS files do not form a certificate with its key."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        files = f"{config.ssl_certfile} and {config.ssl_keyfile}"
        raise ConfigError(f"cannot use TLS files {files}: {error}") from error


def _bind_error(config: ServerConfig, error: OSError) -> ConfigError | PortInUseError:
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"port {config.port} on {config.host} is in use; stop the other server or choose "
            "another port with --port (0 = any free one)"
        )
    return ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}")


def _load(config: ServerConfig) -> AsyncEngine | AsyncEmbedder:
    from sterna.model.hub import resolve_model

    # A wrong name is told before the seconds that torch's import takes.
    path = resolve_model(config.model)
    from sterna.engine.aio import AsyncEngine
    from sterna.engine.build import build_engine

    # Reading weights leaves the interpreter free: the HTTP layer's imports run beside it.
    beside = threading.Thread(target=importlib.import_module, args=("sterna.server.app",))
    beside.start()
    try:
        from sterna.engine.task import resolve_task

        if resolve_task(path, config.engine.task) == "embed":
            return _load_embedder(config)
        return AsyncEngine(build_engine(config.model, config.engine))
    finally:
        beside.join()


def _load_embedder(config: ServerConfig) -> AsyncEmbedder:
    from sterna.engine.build_embed import build_embedder
    from sterna.engine.embed_aio import AsyncEmbedder

    return AsyncEmbedder(build_embedder(config.model, config.engine), config.engine)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop


def _announcement(listener: socket.socket, app: FastAPI, config: ServerConfig) -> str:
    model = app.state.service.model
    host, port = listener.getsockname()[:2]
    if _is_public(host) and not config.keys():
        _log.warning("%s is reachable from other machines and needs no key; set --api-key", host)
    scheme = "https" if config.ssl_certfile else "http"
    shown = f"[{host}]" if ":" in host else host
    if model.num_kv_blocks == 0:
        return (
            f"{scheme}://{shown}:{port} serves {model.names[0]} for embeddings and scores "
            f"(kernels {model.kernels}, {model.token_budget} tokens a step)"
        )
    return (
        f"{scheme}://{shown}:{port} serves {model.names[0]} "
        f"(kernels {model.kernels}, token budget {model.token_budget}, "
        f"{model.num_kv_blocks} KV blocks of {model.block_size} tokens)"
    )


def _is_public(host: str) -> bool:
    return not ipaddress.ip_address(host.partition("%")[0]).is_loopback


async def _run(
    listener: socket.socket,
    app: FastAPI,
    engine: AsyncEngine | AsyncEmbedder,
    config: ServerConfig,
) -> int:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn without its signal handling, which knows no drain."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    server = Server(
        uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            ws="none",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
    )
    shutdown = Shutdown(server, app, engine, config.drain_timeout_s)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, shutdown.on_signal)
    try:
        await server.serve(sockets=[listener])
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
    return shutdown.exit_code


class Shutdown:
    """The first signal drains, the second forces."""

    def __init__(
        self,
        server: uvicorn.Server,
        app: FastAPI,
        engine: AsyncEngine | AsyncEmbedder,
        drain_timeout_s: float,
    ) -> None:
        self._server = server
        self._view = app.state.service.view
        self._engine = engine
        self._timeout_s = drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        self.exit_code = 0

    def on_signal(self) -> None:
        """Called by the event loop."""
        if self._draining is None:
            self._view.is_draining = True
            _log.info("draining for up to %g s; signal again to force", self._timeout_s)
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            _log.warning("forced: running requests are cut off")
            self.exit_code = EXIT_FORCED
            self._draining.cancel()
            self._close(force=True)

    async def _drain(self) -> None:
        if not await self._engine.drain(self._timeout_s):
            _log.warning("requests were still running after %g s and are aborted", self._timeout_s)
            self.exit_code = EXIT_FORCED
        self._close(force=False)

    def _close(self, *, force: bool) -> None:
        self._view.is_closed = True
        self._server.force_exit = force
        self._server.should_exit = True
