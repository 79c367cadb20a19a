"""A server in a thread of this process, and a browser that tells what it complained of and whom it asked."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from posttrain.serve.settings import Settings
from tests.serve.serving import TOKEN, running, settings_at

CHROMIUM = "/usr/bin/chromium"


@dataclass
class Served:
    settings: Settings
    address: str

    def page(self, path: str) -> str:
        return f"{self.address}/dashboard{path}"


@dataclass
class Heard:
    """What a browser's pages said and asked since the test began."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    settings = settings_at(home)
    settings.runs_dir.mkdir()
    # Two threads that wait for each other in a loop get nowhere on cores that others use, too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")
        with running(settings) as at:
            yield Served(at.settings, at.url)


@pytest.fixture(scope="session")
def chromium():
    found = CHROMIUM if Path(CHROMIUM).exists() else shutil.which("chromium")
    if found is None:
        pytest.skip("chromium is missing: apt-get install -y chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, as in a container, Chromium has no sandbox of its own.
        options = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def open_browser(chromium, served, heard):
    """A function that opens a page of a new, logged-in browser; afterwards nobody was asked but the server."""
    contexts = []

    def opened(width=1280, height=860, dark=False, token=TOKEN):
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: heard.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: heard.complaints.append(str(error)))
        page.on("request", lambda request: heard.requests.append(request.url))
        page.set_default_timeout(20_000)
        if token is not None:
            page.goto(f"{served.address}/?token={token}")
        return page

    yield opened
    for context in contexts:
        context.close()
    own = (served.address, served.address.replace("http", "ws"), "data:", "blob:", "about:")
    assert [url for url in heard.requests if not url.startswith(own)] == []
    assert heard.complaints == []
