# SPDX-License-Identifier: Apache-2.0
"""The site of docs/: it builds without a warning, and a browser shows it as it should be.

``pytest -m docs`` builds it (extra `docs`, and PyTorch); ``pytest -m browser`` opens it (selenium, too, and
Debian's packages chromium and chromium-driver).
"""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from needs import need

DOCS = Path(__file__).resolve().parents[1] / "docs"

FETCHED = {"audio", "embed", "iframe", "img", "link", "script", "source", "video"}
"""Elements whose address a browser fetches by itself."""


class Page(HTMLParser):
    """What a page links to and fetches, and the places in it that may be linked to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.fetched, self.places = [], [], {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.places.update(filter(None, (attrs.get("id"), attrs.get("name"))))
        address = attrs.get("href") or attrs.get("src")
        if address is not None:
            (self.fetched if tag in FETCHED else self.links).append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built; a warning is an error."""
    need("sphinx")
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(folder / "doctrees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder / "html")],
        text=True,
        capture_output=True,
    )
    if done.returncode or done.stderr:
        pytest.fail(f"sphinx ends with {done.returncode}:\n{done.stderr}", pytrace=False)
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}


@pytest.mark.docs
def test_every_page_is_built(pages):
    built = {file.name for file in pages}
    assert {f"{page.stem}.html" for page in DOCS.rglob("*") if page.suffix in {".md", ".rst"}} <= built


@pytest.mark.docs
def test_links_lead_somewhere(pages):
    wrong = []
    for file, page in pages.items():
        for link in (*page.links, *page.fetched):
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            if target.suffix == ".html" and target in pages:
                ok = unquote(address.fragment) in pages[target].places
            else:
                ok = target.is_file()
            if not ok:
                wrong.append(f"{file.name}: {link}")
    assert wrong == []


@pytest.mark.docs
def test_nothing_is_fetched_from_elsewhere(pages):
    for file, page in pages.items():
        assert [each for each in page.fetched if urlsplit(each).netloc] == [], file


@pytest.mark.docs
def test_every_public_name_has_a_place(pages):
    import nb_sparse_adam

    places = set().union(*(page.places for page in pages.values()))
    public = {name for name in nb_sparse_adam.__all__ if not name.startswith("__")} - {"errors"}
    assert {f"nb_sparse_adam.{name}" for name in public} <= places
    assert {f"nb_sparse_adam.errors.{name}" for name in nb_sparse_adam.errors.__all__} <= places


# --- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served, on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = need("selenium.webdriver")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync hide-scrollbars"
    )
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def open_page(chromium, url, width=1280, height=900, scheme="light"):
    """Open a page in a window of that size, to somebody who prefers that colour scheme."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    chromium.get(url)


def requested(chromium):
    """Addresses of the net that the browser has gone to since it was asked last."""
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [event["params"]["request"]["url"] for event in sent]
    return [url for url in urls if urlsplit(url).scheme not in {"about", "blob", "chrome", "data"}]


@pytest.mark.browser
def test_every_page_opens_without_an_error_and_with_its_images(chromium, address, site):
    requested(chromium)  # of its first, empty page
    for file in sorted(site.rglob("*.html")):
        url = f"{address}/{file.relative_to(site).as_posix()}"
        open_page(chromium, url)
        assert "nb_sparse_adam" in chromium.title, url
        widths = chromium.execute_script(
            "return [...document.images].map(image => [image.src, image.naturalWidth])"
        )
        assert [source for source, width in widths if width == 0] == [], url
        errors = [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
        assert errors == [], url
        elsewhere = [each for each in requested(chromium) if not each.startswith(address + "/")]
        assert elsewhere == [], url


@pytest.mark.browser
@pytest.mark.parametrize("name", ["index", "pytorch", "reliability", "api/optimizer", "command-line"])
def test_a_page_fits_a_telephone(name, chromium, address):
    open_page(chromium, f"{address}/{name}.html", width=400, height=800)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= 400


@pytest.mark.browser
def test_the_menu_leads_to_pages(chromium, address):
    open_page(chromium, f"{address}/index.html")
    menu = chromium.find_element("css selector", ".sidebar-tree")
    menu.find_element("link text", "Getting started").click()
    assert chromium.title.startswith("Getting started")
    current = chromium.find_element("css selector", ".sidebar-tree .current-page > a")
    assert current.text == "Getting started"


@pytest.mark.browser
def test_a_search_finds(chromium, address):
    from selenium.webdriver.support.ui import WebDriverWait

    open_page(chromium, f"{address}/search.html?q=CSRGradient")
    wait = WebDriverWait(chromium, 20)
    found = wait.until(lambda page: page.find_elements("css selector", "#search-results li a"))
    assert any("CSRGradient" in each.text or "radient" in each.text for each in found)


SCREENS = {"desktop": (1280, 900), "telephone": (400, 800)}


@pytest.mark.browser
@pytest.mark.parametrize("screen", SCREENS)
def test_light_and_dark(screen, chromium, address, tmp_path):
    """Pictures of both are in a folder, SCREENSHOTS or pytest's own, to be looked at."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    brightness = {}
    for scheme in ("light", "dark"):
        open_page(chromium, f"{address}/index.html", *SCREENS[screen], scheme)
        colour = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(map(int, colour.partition("(")[2].rstrip(")").split(",")[:3])) / 3
        picture = folder / f"{screen}-{scheme}.png"
        picture.write_bytes(chromium.get_screenshot_as_png())
        assert picture.stat().st_size > 10_000
    assert brightness["light"] > 200
    assert brightness["dark"] < 60
