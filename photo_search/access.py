"""ASGI middleware: checks Host, Origin and token, limits body sizes, adds security headers.

Pages of other sites in the same browser can send requests here, but cannot choose the headers Host, Origin and
Sec-Fetch-Site, which identify such requests. A token gives access to other machines.
"""

import base64
import hashlib
import hmac
import os
import re
import secrets
import time
from collections import deque

import anyio
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse

from utils.cli import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_PORTS = {"http": 80, "https": 443}  # browsers leave them out of Host and Origin
MIN_TOKEN_LENGTH = 8
AUTO, TOKEN_VARIABLE = "auto", "PAGE_TOKEN"  # the --token that the program makes; the environment variable instead
MAX_WRONG_TOKENS, WRONG_TOKENS_PERIOD_S = 10, 60  # in this time; after them no token is compared until it is over


def choose_token(given):
    """(token, what the printed address shows of it), or (None, None) without one.

    given: --token; AUTO for a new one; None for that of the environment variable TOKEN_VARIABLE, which neither the list
    of processes nor the printed address shows. Raises InputError if it could be guessed, or is no part of an address.
    """
    name, token = "--token", given
    if given == AUTO:
        token = secrets.token_urlsafe(18)
    elif given is None:
        name, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None, None
    if re.search("[^A-Za-z0-9_-]", token):
        raise InputError(f"{name}: only letters, digits, - and _ can be part of it")
    if len(token) < MIN_TOKEN_LENGTH:
        raise InputError(f"{name}: shorter ones can be guessed; give at least {MIN_TOKEN_LENGTH} letters and digits")
    return token, f"<{TOKEN_VARIABLE}>" if name == TOKEN_VARIABLE else token


class BrokenResponse(Exception):
    """The rest of a response cannot be sent: the client sees that it is not whole."""


class AccessMiddleware:
    """Wraps an ASGI application.

    port: of the page; token: gives access by any Host, None for this machine only; policy: the Content-Security-Policy
    of every response; clock: returns seconds.
    """

    def __init__(self, app, port, token, policy, clock=time.monotonic):
        self.app, self.port, self.clock = app, port, clock
        self.token = token and _digest(token)
        # Its value does not follow from the token: guesses in a cookie would not be counted.
        self.cookie, self.session = f"page{port}", secrets.token_hex(32)
        self.wrong_tokens = deque(maxlen=MAX_WRONG_TOKENS)  # when they came
        names = [name if ":" not in name else f"[{name}]" for name in LOOPBACK]
        self.hosts = {f"{name}:{port}" for name in names}
        self.hosts |= set(names) if port in DEFAULT_PORTS.values() else set()
        self.headers = {
            "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
            "X-Frame-Options": "DENY",
        }  # fmt: skip

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
                if message["status"] >= 400 and scope["method"] not in ("GET", "HEAD"):
                    headers["Connection"] = "close"  # the rest of the body is not read
            await send(message)

        connection = HTTPConnection(scope)
        answer = self._cross_site_refusal(scope, connection.headers) or self._login_answer(connection) or self.app
        try:
            await answer(scope, receive, send_with_headers)
        except BrokenResponse:
            return  # the server closes the connection

    def _cross_site_refusal(self, scope, headers):
        """421 or 403 for cross-site requests (CSRF, DNS rebinding); None if the request may pass."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or (not self.token and hosts[0].lower() not in self.hosts):
            return refusal(421, f"this page is at http://{LOOPBACK[0]}:{self.port} alone")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        # A browser that says so compared Origin with the address it asked for, also where a proxy has changed Host.
        own = origin is None or site == "same-origin" or origin in _origins(hosts[0])
        if site not in ("same-origin", "none") and not (scope["path"] == "/" and scope["method"] == "GET"):
            own = False
        return None if own else refusal(403, "another page asked for this, and only this page may")

    def _login_answer(self, connection):
        """401, 429 or the login redirect if a token is set and the cookie is missing; None if authorised."""
        path, given = connection.scope["path"], connection.query_params.get("token")
        if not self.token or path == "/health":
            return None
        if path == "/" and given is not None:
            if self._are_too_many_wrong():
                return refusal(429, "too many wrong tokens; try again in a minute", {"Retry-After": "60"})
            if _same(_digest(given), self.token):
                answer = RedirectResponse("./", 303)  # relative, for a page that a proxy serves under a path
                # Without a path of its own: browsers send it below the address of the page alone. With "lax" a link
                # in a message opens the page; requests of other pages are refused.
                answer.set_cookie(self.cookie, self.session, path=None, httponly=True, samesite="lax")
                return answer
            self.wrong_tokens.append(self.clock())
        if _same(connection.cookies.get(self.cookie, ""), self.session):
            return None
        return refusal(401, "this page needs its token: open it as /?token=... once")

    def _are_too_many_wrong(self):
        """Whether MAX_WRONG_TOKENS came within WRONG_TOKENS_PERIOD_S. Right ones are refused then, too."""
        wrong = self.wrong_tokens
        return len(wrong) == MAX_WRONG_TOKENS and self.clock() - wrong[0] < WRONG_TOKENS_PERIOD_S


def _origins(host):
    """Values of Origin of a page at this Host: with http or https, whose port browsers leave out."""
    ports = DEFAULT_PORTS.items()
    return {f"{scheme}://{name}" for scheme, port in ports for name in (host, host.removesuffix(f":{port}"))}


def refusal(status, why, headers=None):
    """An error response: {"error": why}."""
    return JSONResponse({"error": why}, status, headers)


async def read_body(request, max_bytes, timeout):
    """The body of a request: bytes, at most `max_bytes`, received within `timeout` seconds.

    Raises HTTPException 413 or 408 without reading the rest, and 400 if the client disconnected.
    """
    too_large = HTTPException(413, f"that is too large; at most {max_bytes >> 20} MB work")
    length = request.headers.get("content-length", "0")
    if int(length) > max_bytes:  # the server has checked that it is a number
        raise too_large
    parts, size = [], 0
    try:
        with anyio.fail_after(timeout):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > max_bytes:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the picture did not come within {timeout:g} seconds; try again") from None
    except ClientDisconnect:
        raise HTTPException(400, "the picture broke off; try again") from None
    return b"".join(parts)


def content_security_policy(page):
    """The Content-Security-Policy of an HTML page that allows its one inline script and style, and no others."""
    script, style = (_source(page, name) for name in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' blob: data:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def _source(page, name):
    (content,) = re.findall(f"<{name}>(.*?)</{name}>", page, flags=re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


def _digest(token):
    """What tokens are compared by: any two have the same length."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _same(one, other):
    """Compares two strings in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())
