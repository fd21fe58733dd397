"""Makes docs/figures/page-*.png: the page of `treadle serve demo/bundle` in headless Chromium.

python docs/make_screenshots.py
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
MOST_BYTES = 150_000
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}


@contextmanager
def served() -> Generator[str]:
    """Serve the demo until the end of the block; yields the address."""
    command = [sys.executable, "-m", "treadle", "serve", str(ROOT / "demo" / "bundle"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            yield next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
        finally:
            process.terminate()
            process.stderr.read()


def answer(page: Page, url: str, example: str, token: str = "") -> None:
    """Take an example, wait for both answers, and point at a token of the first where one is given."""
    page.goto(f"{url}/#sampling.max_tokens=48")
    page.locator("#adapter-list li").first.wait_for()
    page.get_by_role("button", name=example, exact=True).click()
    page.get_by_role("button", name="Generate").click()
    page.locator("#send:enabled").wait_for(timeout=120_000)
    page.mouse.move(0, 0)
    if token:
        page.locator(".column").first.locator(".token:not(.read)").get_by_text(token, exact=True).first.hover()


def refuse(page: Page, url: str) -> None:
    """Ask for what the server refuses."""
    page.goto(f"{url}/#sampling.temperature=9&prompt=What is 3 %2B 4?")
    page.locator("#adapter-list li").first.wait_for()
    page.get_by_role("button", name="Generate").click()
    page.locator("[aria-invalid]").wait_for()
    page.locator("#send:enabled").wait_for()


SHOTS: dict[str, tuple[dict[str, Any], Callable[[Page, str], None]]] = {
    "light": ({**DESKTOP, "color_scheme": "light"}, lambda page, url: answer(page, url, "Arithmetic, then code")),
    "dark": ({**DESKTOP, "color_scheme": "dark"}, lambda page, url: answer(page, url, "Science", "B")),
    "phone": ({**PHONE, "color_scheme": "light"}, lambda page, url: answer(page, url, "Arithmetic")),
    "error": ({**DESKTOP, "color_scheme": "light"}, refuse),
}


def main() -> None:
    """Write the figures."""
    chromium = shutil.which("chromium") or sys.exit("there is no Chromium: apt-get install chromium")
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (options, use) in SHOTS.items():
            page = browser.new_page(**options)
            use(page, url)
            shot = Image.open(BytesIO(page.screenshot(full_page=name in ("light", "dark")))).convert("RGB")
            file = FIGURES / f"page-{name}.png"
            shot.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
            print(f"{file.relative_to(ROOT)}: {file.stat().st_size} bytes")
            assert file.stat().st_size < MOST_BYTES
        browser.close()


if __name__ == "__main__":
    main()
