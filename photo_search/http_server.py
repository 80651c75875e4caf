"""The HTTP server of the drawing page: uvicorn with bounds of connections, notes, and the time of a request's head."""

import asyncio
import errno
import logging
import os
import socket
import sys
import time

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from utils.cli import InputError

MAX_CONNECTIONS = 256
HEAD_TIMEOUT_S = 15  # from the first byte of a request, or from the connection, to the end of the request's head
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


class PageServer(uvicorn.Server):
    """A uvicorn.Server that prints a line where asyncio prints a traceback for every connection it cannot take."""

    async def startup(self, sockets=None):
        """As that of uvicorn.Server."""
        asyncio.get_running_loop().set_exception_handler(OutOfFilesHandler())
        await super().startup(sockets)


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which closes a connection where the head of a request is not whole in HEAD_TIMEOUT_S."""

    timer = None

    def connection_made(self, transport):
        """As that of H11Protocol."""
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data):
        """As that of H11Protocol."""
        super().data_received(data)
        self._time_head()

    def connection_lost(self, exc):
        """As that of H11Protocol."""
        super().connection_lost(exc)
        self._stop_timer()

    def _time_head(self):
        if self.conn.their_state is not h11.IDLE:  # the head is there
            self._stop_timer()
        elif self.timer is None:
            self.timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_timer(self):
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class OutOfFilesHandler:
    """An exception handler of event loops: prints at most one line in `period` seconds if too many files are open."""

    def __init__(self, clock=time.monotonic, period=60):
        self.clock, self.period, self.printed = clock, period, -float("inf")

    def __call__(self, loop, context):
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in OUT_OF_FILES):
            loop.default_exception_handler(context)
        elif self.clock() - self.printed >= self.period:
            self.printed = self.clock()
            print("note: connections wait, too many files are open; `ulimit -n` allows more", file=sys.stderr)


def page_config(app):
    """The uvicorn.Config of an ASGI application."""
    # A photo that becomes shorter while it is sent is no error of the program.
    logging.getLogger("uvicorn.error").addFilter(_is_not_broken_response)
    return uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", http=TimedProtocol, ws="none",
        limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=2, h11_max_incomplete_event_size=1 << 14,
    )  # fmt: skip


def _is_not_broken_response(record):
    return "without completing response" not in str(record.msg)


def listen(host, port):
    """A socket that listens at host and port. Raises InputError if there can be none."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except socket.gaierror as error:
        raise InputError(f"--host {host}: not an address of this machine ({error.strerror})") from None
    except UnicodeError:
        raise InputError(f"--host {host}: not a name of a machine") from None
    except OSError as error:
        why = os.strerror(error.errno)
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(f"--host {host}: not an address of this machine ({why.lower()})") from None
        raise InputError(f"--host {host} --port {port}: {why.lower()}; choose another --port") from None
