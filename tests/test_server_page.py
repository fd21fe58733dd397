"""The page's files: what is sent to whom, and that a built package has them."""

import hashlib
import json
import re
import tomllib
from collections.abc import Generator
from pathlib import Path

import pytest

from treadle.common.palette import COLOURS
from treadle.serving.openai import page

from serving import Serving, serving

ROOT = Path(__file__).parents[1]
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, api_key=("secret",)) as each:
        yield each


@pytest.mark.parametrize("path", ["/", *(page.PREFIX + name for name in page.files())])
def test_the_files_need_no_key_and_say_nothing_of_the_bundle(served: Serving, path: str) -> None:
    answer = served.request("GET", path)
    assert answer.status_code == 200
    assert "max-age" not in answer.headers["cache-control"]
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    name = path.removeprefix(page.PREFIX) if path != "/" else "index.html"
    assert answer.content == (page.FOLDER / name).read_bytes()  # as in the package: nothing of this server is put in


def test_what_is_not_a_file_needs_a_key(served: Serving) -> None:
    for path in ("/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/vendor", "/index.html"):
        assert served.request("GET", path).status_code == 401, path
        assert served.request("GET", path, headers=KEY).status_code == 404, path
    assert served.request("POST", "/").status_code == 405


def test_an_unchanged_file_is_not_sent_again(served: Serving) -> None:
    tag = served.request("GET", "/page/app.js").headers["etag"]
    again = served.request("GET", "/page/app.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    html = page.files()["index.html"].content.decode()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", html)
    for name, file in page.files().items():
        if not name.startswith("vendor/") and name != "icon.svg":
            assert not re.search(r"https?://|//cdn|@import|innerHTML|insertAdjacentHTML", file.content.decode()), name


def test_the_page_can_be_left_out(bundle_folder: Path) -> None:
    with serving(bundle_folder, api_key=("secret",), page=False) as served:
        assert served.request("GET", "/").status_code == 401
        assert served.request("GET", "/", headers=KEY).status_code == 404


def test_a_built_package_has_every_file() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    folder = page.FOLDER.parent
    packed = {path for pattern in data["treadle.serving.openai"] for path in folder.glob(pattern) if path.is_file()}
    assert {page.FOLDER / name for name in page.files()} <= packed


def test_the_chart_library_is_as_it_was_fetched() -> None:
    vendor = page.FOLDER / "vendor"
    digest = hashlib.sha256((vendor / "chart.umd.min.js").read_bytes()).hexdigest()
    note = (vendor / "README.md").read_text("utf-8")
    assert digest in note
    version = re.search(rb"Chart\.js v([\d.]+)", (vendor / "chart.umd.min.js").read_bytes())
    assert version
    assert f"Chart.js {version[1].decode()}" in note
    assert "MIT" in (vendor / "LICENSE.md").read_text("utf-8")


def test_the_page_has_the_colours_of_the_terminal_and_of_plots() -> None:
    text = page.files()["colours.js"].content.decode()
    (listed,) = re.findall(r"^const COLOURS = (\[.*\]);$", text, re.MULTILINE)
    assert tuple(json.loads(listed)) == COLOURS
