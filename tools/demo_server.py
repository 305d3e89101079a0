"""The demo's door: one port of one address, closed to what is too long."""

import errno
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    import gradio

MB = 1 << 20
REQUEST_BYTES = 1 * MB  # of a request that uploads nothing, and around an upload
LOCAL = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> socket.socket:
    """Take a port, so that no one else does.

    Args:
        port: 0 takes a free one.
    Raises:
        UserError: it is taken, may not be used, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except socket.gaierror:
        raise UserError(f"--host {host} is no address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: name another, --port N") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} may not be used: name one from 1024 on") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host} is no address of this machine") from None
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from None


def serve(page: "gradio.Blocks", css: str, door: socket.socket, max_bytes: int) -> None:
    """Answer at an open door until Ctrl-C or a request to end.

    gradio's own `launch` would look for another port, ask itself over HTTP whether it is there,
    and wait for pages that are still open.

    Args:
        css: styles of the page.
        max_bytes: of an uploaded file.
    """
    import fastapi
    import gradio as gr
    import uvicorn
    from loguru import logger

    app = fastapi.FastAPI(openapi_url=None)
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )  # fonts that are there, so none is fetched
    host, port = door.getsockname()[:2]
    gr.mount_gradio_app(
        app, page, "/", server_name=host, server_port=port, max_file_size=max_bytes,
        show_error=False, footer_links=[], run_history=False, enable_monitoring=False,
        ssr_mode=False, mcp_server=False,
        theme=theme, css=css,
    )  # fmt: skip
    server = uvicorn.Server(
        uvicorn.Config(
            limit_requests(app, max_bytes),
            log_level="error",
            timeout_graceful_shutdown=1,
            lifespan="on",
        )
    )

    def end(number: int, frame: FrameType | None) -> None:
        # Pages that are still open are cut off, and nothing needs to be said of it.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        uvicorn.Server.handle_exit(server, number, frame)

    server.handle_exit = end
    # Being told to end by the system is like Ctrl-C: the folder of photos goes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if host not in LOCAL:
        logger.warning(f"{host} is not for this machine alone: whoever reaches it can use the page")
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{port}/ (Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[door])


def limit_requests(app: Callable, max_bytes: int) -> Callable:
    """An ASGI app that refuses what is too long before any of it is read."""
    from starlette.responses import JSONResponse

    async def answer(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            is_upload = scope["path"].rstrip("/").endswith("/upload")
            limit = REQUEST_BYTES + (max_bytes if is_upload else 0)
            if not length.isdigit() or int(length) > limit:
                refusal = JSONResponse({"detail": f"at most {limit} bytes are taken"}, 413)
                await refusal(scope, receive, send)
                return
        await app(scope, receive, send)

    return answer
