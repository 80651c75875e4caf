"""ASGI middleware: checks Host, Origin and token, limits body sizes, adds security headers.

Pages of other sites in the same browser can send requests here, but cannot choose the headers Host, Origin and
Sec-Fetch-Site, which identify such requests. A token gives access to other machines.
"""

import base64
import hashlib
import hmac
import re

import anyio
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class AccessMiddleware:
    """Wraps an ASGI application.

    port: of the page; token: gives access by any Host, None for this machine only; policy: the Content-Security-Policy
    of every response.
    """

    def __init__(self, app, port, token, policy):
        self.app, self.port = app, port
        self.cookie, self.key = f"page{port}", token and _digest(token)
        names = (name if ":" not in name else f"[{name}]" for name in LOOPBACK)
        self.hosts = {f"{name}:{port}" for name in names}
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
        await answer(scope, receive, send_with_headers)

    def _cross_site_refusal(self, scope, headers):
        """421 or 403 for cross-site requests (CSRF, DNS rebinding); None if the request may pass."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or (not self.key and hosts[0].lower() not in self.hosts):
            return refusal(421, f"this page is at http://{LOOPBACK[0]}:{self.port} alone")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        own = origin in (None, f"http://{hosts[0]}", f"https://{hosts[0]}")
        if site not in ("same-origin", "none") and not (scope["path"] == "/" and scope["method"] == "GET"):
            own = False
        return None if own else refusal(403, "another page asked for this, and only this page may")

    def _login_answer(self, connection):
        """401, or the login redirect, if a token is set and the cookie is missing; None if authorised."""
        if not self.key:
            return None
        if connection.scope["path"] == "/" and _same(_digest(connection.query_params.get("token", "")), self.key):
            answer = RedirectResponse("./", 303)  # relative, for a page that a proxy serves under a path
            answer.set_cookie(
                self.cookie, self.key, httponly=True, samesite="lax"
            )  # a link in a message opens it; requests of other pages are refused
            return answer
        if _same(connection.cookies.get(self.cookie, ""), self.key):
            return None
        return refusal(401, "this page needs its token: open it as /?token=... once")


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
    """The value of the cookie, which does not reveal the token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _same(one, other):
    """Compares two strings in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())
