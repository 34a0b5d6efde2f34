"""Pictures of the demo's page for the README: a slide that was drawn, a question about another, and its answer.

    python examples/demo/screenshots.py --ckpt demo-output/tuned

needs playwright and chromium. The checkpoint is the one that `make demo` leaves, which knows these answers by heart.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from medmax_fast.config import DemoConfig
from medmax_fast.demo.command import serving

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"wide": (1280, 800), "phone": (390, 844)}
PATIENCE = 600_000


def ask(page: Page, text: str) -> None:
    """Send a question and wait for its answer."""
    page.fill("#question textarea", text)
    # What the last answer left there must not be taken for this one's.
    page.evaluate("document.querySelector('#status p').textContent = ''")
    page.press("#question textarea", "Enter")
    page.wait_for_function("document.querySelector('#status p').textContent.startsWith('Done')")


def shoot(page: Page, path: Path) -> None:
    """The conversation, and the page as it is then."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Greedy").check()
    # The tiny model's unconditioned stream is untrained; the published scale of 3 would follow its noise.
    page.get_by_label("number input for Guidance by text").fill("1.5")
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_label("A picture").check()
    ask(page, "Generate a histology slide with brown glands.")
    page.get_by_label("Text", exact=True).check()
    page.set_input_files("#question input[type=file]", ROOT / "medmax_fast" / "demo" / "examples" / "gland.jpg")
    page.locator("#question .thumbnail-item").wait_for()
    ask(page, "Is one round gland in the centre?")
    # Until the picture is there, and the page has scrolled to it.
    page.wait_for_timeout(1500)
    page.screenshot(path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="demo-output/tuned", help="checkpoint folder (default: demo-output/tuned)")
    parser.add_argument("--output", default=str(ROOT / "docs"), help="folder for the pictures (default: docs)")
    options = parser.parse_args()
    with serving(DemoConfig(ckpt=options.ckpt, port=0)) as demo, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(PATIENCE)
            page.goto(demo.url)
            shoot(page, Path(options.output) / f"demo_{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
