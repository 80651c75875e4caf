"""The page and its server in a browser: interruptions, indexes that come and go, and a proxy between the two."""

import http.client
import http.server
import json
import os
import threading
from contextlib import ExitStack, contextmanager

import pytest
from albums import FakeEncoder, update
from browser import By
from pages import reloading_index_of, served


def test_offline_and_back_the_search_comes_by_itself(visit):
    visit.example("bell")
    before = visit.names
    visit.online(False)
    visit.stroke()
    visit.until("return at('status').textContent === 'No answer from the server; asking again …'")
    assert visit.names == before and visit.run("return list.ariaBusy") == "true"  # the old photos stay, faded
    visit.online(True)
    assert visit.wait().names != before and visit.status == "Photos that look like the drawing"
    assert {"ERR_INTERNET_DISCONNECTED" in entry["message"] for entry in visit.driver.get_log("browser")} == {True}


def test_a_page_that_opens_before_its_server_answers_loses_no_stroke(visit):
    visit.run("""
        window.real = fetch;
        window.fetch = () => Promise.reject(new TypeError('Failed to fetch'));
        index = about = null;
        window.again = begin();
    """)
    visit.until("return at('status').textContent.startsWith('No answer')")
    visit.stroke()
    assert visit.get("status").get_attribute("class") == "busy"
    visit.run("window.fetch = real; wake()")
    visit.driver.execute_async_script("again.then(arguments[0])")
    assert visit.wait().names


@pytest.mark.parametrize("becomes", ["gone", "of another network"])
def test_an_index_that_cannot_be_used_is_told_and_asked_for_again(visit, page_index, becomes):
    visit.example("bell")
    before, content = visit.names, json.loads((page_index / "index.json").read_text())
    os.rename(page_index / "index.json", page_index / "elsewhere.json")
    if becomes == "of another network":
        (page_index / "index.json").write_text(json.dumps(content | {"sha256": "ab" * 32}))
    try:
        visit.stroke()
        visit.until("return at('status').textContent.endsWith('asking again …')")
        said = "no index of photos" if becomes == "gone" else "not the checkpoint that the index was made with"
        assert said in visit.status and visit.names == before
    finally:
        os.rename(page_index / "elsewhere.json", page_index / "index.json")
    visit.run("wake()")
    assert visit.wait().names != before
    assert {"503" in entry["message"] for entry in visit.driver.get_log("browser")} == {True}


def test_the_first_indexing_is_shown_until_it_is_done(visit, page_index, tmp_path, monkeypatch):
    folder, shown = tmp_path / "index", []

    class WatchedEncoder(FakeEncoder):
        def embed(self, images):
            if not self.seen:
                port = stack.enter_context(served(reloading_index_of(folder, monkeypatch)))
                visit.driver.get(f"http://127.0.0.1:{port}/")
                visit.run("act({width: 18, erase: false, points: [100, 100, 900, 500]})")
            visit.run("wake()")
            visit.until("return at('status').textContent.includes(arguments[0])", f"indexed, {self.seen} of 58")
            shown.append(visit.get("status").get_attribute("class"))
            return super().embed(images)

    with ExitStack() as stack:
        update(folder, WatchedEncoder(), page_index.parent / "album", batch_size=30)
        visit.run("wake()")
        visit.driver.execute_async_script("ready.then(arguments[0])")
        assert visit.wait().names and shown == ["busy", "busy"]
        visit.driver.get("about:blank")
    assert {"503" in entry["message"] for entry in visit.driver.get_log("browser")} == {True}


PREFIX = "/sketch"


@contextmanager
def behind_a_path(port):
    """The address of a proxy that serves another port of this machine under PREFIX, and / with a link to it."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def answer(self):
            own = self.path.startswith(PREFIX + "/")
            if own:
                other = http.client.HTTPConnection("127.0.0.1", port)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                other.request(self.command, self.path.removeprefix(PREFIX), body or None, dict(self.headers.items()))
                answer = other.getresponse()
                status, headers, content = answer.status, answer.getheaders(), answer.read()
            else:
                link = f"http://127.0.0.1:{self.server.server_port}{PREFIX}/?token={TOKEN}"
                status, headers, content = 200, [("Content-Type", "text/html")], f"<a href='{link}'>draw</a>".encode()
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield proxy.server_port
        finally:
            proxy.shutdown()
            thread.join()


TOKEN = "abcdefgh-123"


def test_a_link_of_another_site_opens_the_page_under_a_path_behind_a_proxy(visit, reloading_index):
    with served(reloading_index, token=TOKEN) as port, behind_a_path(port) as proxy:
        visit.driver.get(f"http://localhost:{proxy}/")  # another site than 127.0.0.1
        visit.driver.find_element(By.TAG_NAME, "a").click()
        visit.until("return location.href === arguments[0]", f"http://127.0.0.1:{proxy}{PREFIX}/")
        visit.driver.execute_async_script("ready.then(arguments[0])")
        assert visit.example("bell").names
        assert visit.run("return [...list.querySelectorAll('img')].every(image => image.naturalWidth > 0)")
        visit.driver.find_element(By.CLASS_NAME, "photo").click()
        visit.until("return view.naturalWidth === 128")
        visit.driver.get("about:blank")
