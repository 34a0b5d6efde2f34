"""The demo's page in a real browser, headless, against a server with a real (random) checkpoint.

Every page of the browser is watched: nothing may be written to its console, and no request may leave this machine.
"""

import hashlib
import io
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

from medmax_fast.config import DemoConfig  # noqa: E402
from medmax_fast.demo import command  # noqa: E402
from medmax_fast.generate.engine import Engine  # noqa: E402
from medmax_fast.generate.requests import Request  # noqa: E402

# Gradio's own use of pandas.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
# Milliseconds for what a machine that does other things may take long to do.
PATIENCE = 120_000
QUESTION = "#question textarea"
STATUS = "#status p"
# A prompt to which the golden checkpoint's greedy answer begins a picture after a few words.
INTERLEAVED = "Explain figure 37 with a picture."


def png(height: int, width: int, seed: int = 0) -> bytes:
    """Noise, which does not compress; grey for a seed of -1, which does."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    if seed >= 0:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def upload(name: str, data: bytes) -> dict:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(golden):
    """The demo as a user starts it, but for limits that are quick to break."""
    config = DemoConfig(
        ckpt=str(golden / "checkpoint"), port=0, batch_size=2, waiting=2, max_upload_mb=0.5, max_pixels=0.3
    )
    with command.serving(config) as running:
        yield running
    assert not running.folder.exists() and not len(running.visitors) and not len(running.uploads)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the browser tests need chromium")
    switches = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"]
    switches += ["disable-sync", "no-first-run", "disable-quic"]
    with sync_api.sync_playwright() as playwright:
        arguments = [f"--{switch}" for switch in switches]
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=arguments)
        yield browser
        browser.close()


@pytest.fixture()
def open_page(server, browser):
    """open_page(**options of the browser's page): the demo, watched to the end of the test."""
    pages, complaints = [], []

    def open_one(**options):
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **options})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(f"console: {message.type} {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: complaints.append(f"outside: {request.url}") if outside(request) else None)
        page.on("response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.goto(server.url)
        page.wait_for_selector(QUESTION)
        pages.append(page)
        return page

    def outside(request) -> bool:
        return not request.url.startswith((server.url, "data:", "blob:"))

    yield open_one
    for page in pages:
        page.close()
    assert not complaints
    # A closed page leaves nothing behind.
    wait_until(lambda: not len(server.visitors) and not server.dispatcher.running and not len(server.uploads))


def set_up(page, **values) -> None:
    """Greedy and short answers, from the drawer."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Greedy").check()
    for label, value in values.items():
        page.get_by_label(f"number input for {label.replace('_', ' ')}").fill(str(value))
    page.get_by_label("Toggle Sidebar").click()


def ask(page, text: str, wait: str = "Done") -> None:
    """Send a question and wait for a line of the status."""
    page.fill(QUESTION, text)
    # What the last answer left there must not be taken for this one's.
    page.evaluate("document.querySelector('#status p').textContent = ''")
    page.press(QUESTION, "Enter")
    page.wait_for_function(f"document.querySelector('#status p').textContent.startsWith('{wait}')")


def answers(page) -> list[str]:
    """The texts of the answers."""
    return page.locator("#chat [data-testid=bot] .text").all_inner_texts()


def test_upload_two_images_ask_and_read(server, open_page, golden, tmp_path):
    page = open_page()
    assert page.locator("#head").get_by_text("nothing that this model says or draws is medical advice").is_visible()
    images = [png(300, 300, 1), png(200, 300, 2)]
    page.set_input_files("#question input[type=file]", [upload("a.png", images[0]), upload("b.png", images[1])])
    page.locator("#question .thumbnail-item").nth(1).wait_for()
    set_up(page, Longest_text=24)
    seen = set()
    page.expose_function("seen", lambda text: seen.add(text))
    page.evaluate("""new MutationObserver(() => seen([...document.querySelectorAll('#chat [data-testid=bot] .text')]
                     .map(e => e.innerText).join())).observe(document.querySelector('#chat'),
                     {childList: true, subtree: true, characterData: true})""")
    # Whatever is said is text, and fetches nothing.
    question = "What is ${seen} {{here}}, <img src='http://127.0.0.2/'>?"
    ask(page, question)
    for i, data in enumerate(images):
        (tmp_path / f"{i}.png").write_bytes(data)
    content = [{"type": "image", "path": str(tmp_path / f"{i}.png")} for i in range(2)]
    content.append({"type": "text", "text": question})
    engine = Engine.from_checkpoint(golden / "checkpoint", device="cpu")
    (expected,) = engine.generate([Request("1", content, greedy=True, max_new_tokens=24)])
    assert " ".join(answers(page)[-1].split()) == " ".join(expected.content[0]["text"].split())
    # Not all at once: at least once a part of it was there.
    assert len(seen - {""}) > 1
    assert page.locator("#chat img").all() and page.locator("#chat img[alt='b.png, as the model sees it']").is_visible()
    assert page.input_value(QUESTION) == "" and page.locator("#question .thumbnail-item").count() == 0
    assert page.locator(".text").first.inner_text() == question and len(server.uploads) == 2
    # As after a night's sleep of the visitor's machine.
    for key in list(server.visitors._talks):
        server.visitors.leave(key)
    ask(page, "And now?")
    assert "the connection was lost, so this is a new one" in page.inner_text(STATUS) and len(answers(page)) == 1


def test_draw_with_previews_download_and_ask_about_it(server, open_page):
    page = open_page()
    set_up(page, Longest_text=4)
    page.get_by_label("A picture").check()
    ask(page, "A histology slide.", "Drawing")
    page.wait_for_selector("#chat .drawn img[src^='data:image/jpeg']")
    page.wait_for_selector("#chat .drawn a[download]")
    picture = page.locator("#chat .drawn img")
    assert picture.count() == 1 and picture.get_attribute("alt") == "Picture drawn for: A histology slide."
    assert picture.evaluate("image => image.naturalWidth") == 512
    with page.expect_download() as download:
        page.click("#chat .drawn a[download]")
    file = download.value.path()
    with Image.open(file) as image:
        assert (image.format, image.size) == ("PNG", (512, 512)) and download.value.suggested_filename.endswith(".png")
    page.get_by_label("Text", exact=True).check()
    ask(page, "What is it?")
    assert len(answers(page)) == 1
    # The engine took the picture for the codes that it was drawn from.
    known = server.dispatcher._engine.encoder._codes
    assert hashlib.sha256(file.read_bytes()).hexdigest() in known
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_selector("#chat .example")
    assert answers(page) == []


def test_interleaved(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    set_up(page, Longest_text=20)
    page.get_by_label("Both").check()
    ask(page, INTERLEAVED)
    kinds = [
        "picture" if message.locator("img").count() else "text" for message in page.locator("[data-testid=bot]").all()
    ]
    assert kinds == ["text", "picture", "text"]
    # Each text can be copied by itself.
    page.get_by_role("button", name="Copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == answers(page)[0].strip()


def test_stop_in_the_middle_of_a_picture_and_begin_anew(server, open_page):
    page = open_page()
    page.get_by_label("A picture").check()
    ask(page, "A cell.", "Drawing")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(f"{STATUS} >> text=Stopped")
    wait_until(lambda: server.dispatcher.running == 0)
    assert page.locator("#chat .drawn").count() == 0 and "(no answer)" in answers(page)[-1]
    ask(page, "Another cell.", "Drawing")
    page.get_by_role("button", name="New conversation").click()
    wait_until(lambda: server.dispatcher.running == 0)
    page.wait_for_selector(f"{STATUS} >> text=Ready")
    page.wait_for_selector("#chat .example")
    assert answers(page) == []


def test_a_closed_page_ends_its_answer(server, open_page):
    page = open_page()
    page.get_by_label("A picture").check()
    ask(page, "A cell.", "Drawing")
    folders = [path for path in server.folder.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]
    page.close()
    wait_until(lambda: server.dispatcher.running == 0 and not any(path.exists() for path in folders))


def test_examples_fill_the_box(open_page):
    page = open_page()
    page.get_by_role("button", name="Select example 3").click()
    page.locator("#question .thumbnail-item").nth(1).wait_for()
    page.get_by_role("button", name="Select example 5").click()
    page.wait_for_function(f"document.querySelector('{QUESTION}').value.startsWith('Generate')")
    assert page.get_by_label("A picture").is_checked() and page.locator("#question .thumbnail-item").count() == 0


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("broken.png", b"no image at all", "broken.png: not an image"),
        ("wide.png", png(500, 601, -1), "wide.png: 601 x 500"),
        ("large.png", png(450, 450), "exceed the maximum allowed size"),
    ],
)
def test_uploads_that_are_refused(open_page, name, data, message):
    page = open_page()
    page.fill(QUESTION, "What is this?")
    page.set_input_files("#question input[type=file]", upload(name, data))
    if name != "large.png":
        page.locator("#question .thumbnail-item").wait_for()
        page.press(QUESTION, "Enter")
    page.get_by_text(message).first.wait_for()
    # Nothing is lost of what was typed, and it can be sent without the image.
    assert page.input_value(QUESTION) == "What is this?"
    for button in (*page.get_by_label("Remove file").all(), *page.get_by_test_id("toast-close").all()):
        button.click()
    set_up(page, Longest_text=2)
    ask(page, "What is this?")


# Of every element with text of its own: what it says and its contrast to what is behind it.
CONTRAST = """() => {
    const parse = c => { const v = c.match(/[0-9.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v };
    const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b };
    const found = [];
    for (const e of document.querySelectorAll('.gradio-container *')) {
        const box = e.getBoundingClientRect(), style = getComputedStyle(e);
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.placeholder;
        if (!own || box.width < 2 || !e.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
        let behind = e;
        while (behind && parse(getComputedStyle(behind).backgroundColor)[3] < 1) behind = behind.parentElement;
        const ground = behind ? getComputedStyle(behind).backgroundColor : 'rgb(255, 255, 255)';
        const colour = e.placeholder && !e.value ? getComputedStyle(e, '::placeholder').color : style.color;
        const [a, b] = [light(parse(colour)), light(parse(ground))].sort((x, y) => y - x);
        found.push([e.innerText || e.placeholder, (a + 0.05) / (b + 0.05)]);
    }
    return found }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_readably(open_page, scheme):
    page = open_page(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True, is_mobile=True)
    page.get_by_role("button", name="Select example 1").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    parts = [QUESTION, "#head p", "#question button", "#mode input", "#drawer", "#clear", "#chat .example"]
    for part in parts:
        for found in page.locator(part).filter(visible=True).all():
            box = found.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844, part
    low = [(text, ratio) for text, ratio in page.evaluate(CONTRAST) if ratio < 4.5]
    page.get_by_role("button", name="Settings").tap()
    page.get_by_label("Toggle Sidebar").wait_for()
    page.get_by_label("Greedy").check()
    page.get_by_label("number input for Longest text").fill("2")
    seed = page.get_by_label("Seed")
    seed.scroll_into_view_if_needed()
    assert seed.bounding_box()["width"] > 200
    checked = page.evaluate(CONTRAST)
    page.get_by_label("Toggle Sidebar").tap()
    ask(page, "What is this?")
    checked += page.evaluate(CONTRAST)
    low += [(text, ratio) for text, ratio in checked if ratio < 4.5]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and answers(page)
    assert len(checked) > 30 and not low


# What the element that has the focus is called.
FOCUSED = """(e => e === document.body ? '' : e.ariaLabel || e.innerText || e.closest('label')?.innerText || '')
             (document.activeElement)"""


def test_by_keyboard_alone(server, open_page):
    page = open_page()
    press = page.keyboard.press

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(40):
            here = page.evaluate(FOCUSED)
            if here.strip() == name:
                return
            press(key)
        raise AssertionError(f"{name} cannot be reached")

    # The cursor is in the box from the beginning.
    assert page.evaluate(f"document.activeElement === document.querySelector('{QUESTION}')")
    page.keyboard.type("Draw a cell.")
    tab_to("A picture")
    press("Space")
    assert page.get_by_label("A picture").is_checked()
    tab_to("Submit", "Shift+Tab")
    press("Enter")
    page.wait_for_function("document.querySelector('#status p').innerText.startsWith('Drawing')")
    tab_to("Stop")
    press("Enter")
    page.wait_for_selector(f"{STATUS} >> text=Stopped")
    tab_to("Settings")
    press("Enter")
    tab_to("Greedy")
    press("Space")
    assert page.get_by_label("Greedy").is_checked()
    tab_to("Published defaults")
    press("Enter")
    page.wait_for_function("!document.querySelector('#settings input[type=checkbox]').checked")
    tab_to("Toggle Sidebar", "Shift+Tab")
    press("Enter")
    page.wait_for_selector("#settings:not(.open)")


def test_the_line_and_two_pages_at_once(server, open_page):
    first, second = open_page(), open_page()
    for page in (first, second):
        set_up(page, Longest_text=8)
    long = Request("long", [{"type": "text", "text": "A cell."}], mode="image")
    with server.dispatcher.submit(long) as one, server.dispatcher.submit(long) as two:
        wait_until(lambda: server.dispatcher.running == 2)
        with server.dispatcher.submit(long):
            ask(first, "First?", "Waiting, 1 before you")
            # The line of two is full now.
            second.fill(QUESTION, "Second?")
            second.press(QUESTION, "Enter")
            second.wait_for_selector(f"{STATUS}[role=alert] >> text=2 requests are waiting; what you typed is kept")
            assert second.input_value(QUESTION) == "Second?"
        one.cancel(), two.cancel()
    second.press(QUESTION, "Enter")
    for page in (first, second):
        page.wait_for_function("document.querySelector('#status p').innerText.startsWith('Done')")
    # Each its own conversation.
    assert "First?" in first.inner_text("#chat") and "First?" not in second.inner_text("#chat")
