"""Photographs the page of `examples/space`: `page-patches.png`, `page-thresholds.png`, `page-generate.png` and so on.

python examples/space/app.py --port 7860 &
python docs/images/page.py [CHROMIUM] [ADDRESS]        # needs playwright, and Chromium (by default /usr/bin/chromium)

Debian's fonts-noto-core, fonts-noto-cjk and fonts-noto-color-emoji have all characters of the texts.
"""

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


HERE = Path(__file__).parent
TEXT = "Größere Änderungen: a function call always returns some value, possibly None. Это пример текста, 日本語の文 🙂"


def open_page(browser, address: str, width: int, height: int, scale: float) -> Page:
    context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#patches .blt-summary")
    return page


def write(page: Page) -> None:
    page.get_by_role("tab", name="Generate").click()
    page.click("#write")
    page.wait_for_function("document.querySelector('#counts')?.textContent.trim().startsWith('150 bytes')")


def main(chromium: str, address: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = open_page(browser, address, 1080, 640, 1.4)
        page.locator("#text textarea").fill(TEXT)
        page.wait_for_function("document.querySelector('#patches .blt-row')?.textContent.includes('🙂')")
        page.screenshot(path=HERE / "page-patches.png", full_page=True)
        page.get_by_role("tab", name="Two thresholds").click()
        # The patches are those of the threshold that the slider shows.
        shown = "[...document.querySelectorAll('input[type=number]')].filter(field => field.offsetParent).at(-1).value"
        page.wait_for_function(
            f"document.querySelector('#second .blt-summary')?.textContent.includes(Number({shown}).toFixed(3))"
        )
        page.screenshot(path=HERE / "page-thresholds.png", full_page=True)
        write(page)
        page.screenshot(path=HERE / "page-generate.png", full_page=True)
        page = open_page(browser, address, 390, 844, 2)
        write(page)
        page.screenshot(path=HERE / "page-phone.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*(sys.argv[1:] + ["/usr/bin/chromium", "http://127.0.0.1:7860"][len(sys.argv) - 1 :]))
