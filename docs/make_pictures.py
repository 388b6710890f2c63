"""Take the README's pictures of a run's report, light and dark: python docs/make_pictures.py runs/quickstart"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1200, 1270


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--height", type=int, default=HEIGHT, help="pixels of the page from its top")
    arguments = parser.parse_args()
    page_uri = (arguments.run / "report.html").resolve().as_uri()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            viewport = {"width": WIDTH, "height": arguments.height}
            page = browser.new_page(viewport=viewport, color_scheme=scheme, device_scale_factor=1)
            page.goto(page_uri)
            path = Path(__file__).with_name(f"report_{scheme}.png")
            page.screenshot(path=path)
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
