"""Makes docs/figures/page-*.png: the page of `treadle serve demo/bundle` in headless Chromium, light, dark and narrow.

python docs/make_screenshots.py
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
MOST_BYTES = 150_000
SHOTS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 360, "height": 760}, "color_scheme": "light", "device_scale_factor": 2},
}
POINTED_AT = " Python"
"""The token of the prompt whose numbers are shown."""


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


def use(page: Page, url: str, *, is_narrow: bool) -> None:
    """Answer the first example side by side, and point at a token in the middle of the change."""
    page.goto(f"{url}/#{'other=&' if is_narrow else ''}sampling.max_tokens=48")
    page.locator("#adapter-list li").first.wait_for()
    page.get_by_role("button", name="Arithmetic, then code").click()
    page.get_by_role("button", name="Generate").click()
    page.locator("#send:enabled").wait_for(timeout=120_000)
    token = page.locator(".column").first.locator(".token").get_by_text(POINTED_AT, exact=True).first
    if is_narrow:
        page.locator(".column").first.evaluate("each => each.scrollIntoView({ block: 'start' })")
    token.hover()


def main() -> None:
    """Write the figures."""
    chromium = shutil.which("chromium") or sys.exit("there is no Chromium: apt-get install chromium")
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, options in SHOTS.items():
            page = browser.new_page(**options)
            use(page, url, is_narrow=name == "narrow")
            shot = Image.open(BytesIO(page.screenshot(full_page=name != "narrow"))).convert("RGB")
            file = FIGURES / f"page-{name}.png"
            shot.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
            print(f"{file.relative_to(ROOT)}: {file.stat().st_size} bytes")
            assert file.stat().st_size < MOST_BYTES
        browser.close()


if __name__ == "__main__":
    main()
