"""The page: one chat with its controls, made with Gradio, which no other module imports.

Handlers hold no state: a page's conversation is found by the page's session hash. The only network that the page uses
is this server's own address.
"""

import html
import json
from collections.abc import Collection, Iterator
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import gradio as gr

from medmax_fast.data.images import SUFFIXES
from medmax_fast.demo import settings
from medmax_fast.demo.answer import Picture, Preview
from medmax_fast.demo.talk import View, Visitors
from medmax_fast.runtime import InputError
from medmax_fast.serving.hosts import HostCheck

DISCLAIMER = "For research only: nothing that this model says or draws is medical advice."
MODES = (("Text", "text"), ("A picture", "image"), ("Both", "any"))
HERE = Path(__file__).resolve().parent
EXAMPLES = HERE / "examples"
STYLE = HERE / "page.css"
# For handlers that answer at once: not in the queue, not part of an API, nothing shown while they run.
_QUIET = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
# Scrolls to what is new, unless the reader has scrolled away; Gradio's own does not see HTML grow.
_FOLLOW = """() => {
    const chat = document.querySelector('#chat');
    let last = true;
    chat.addEventListener('scroll', e => {
        last = e.target.scrollHeight - e.target.scrollTop - e.target.clientHeight < 100;
    }, true);
    const follow = () => {
        const log = chat.querySelector('[role=log]');
        if (log && last && log.querySelector('.pieces')) log.scrollTop = log.scrollHeight;
    };
    new MutationObserver(follow).observe(chat, {childList: true, subtree: true, characterData: true});
}"""
# Seconds between looks for files that the box took, and their age when they are deleted; a conversation has copies.
_SWEEP, _UPLOAD_AGE = 60, 900


def build(visitors: Visitors, name: str, draws: bool) -> gr.Blocks:
    """The page of a model called `name`; without `draws` the choices that need a picture are switched off."""
    gr.set_static_paths([EXAMPLES])
    examples = json.loads((EXAMPLES / "examples.json").read_text())["examples"]
    if not draws:
        examples = [example for example in examples if example["mode"] == "text"]
    with gr.Blocks(
        title="medmax", analytics_enabled=False, fill_height=True, delete_cache=(_SWEEP, _UPLOAD_AGE)
    ) as page:
        gr.HTML(f"<h1>medmax <small>{html.escape(name)}</small></h1><p>{DISCLAIMER}</p>", elem_id="head")
        chat = gr.Chatbot(
            label="Conversation",
            show_label=False,
            elem_id="chat",
            height=None,
            scale=1,
            group_consecutive_messages=False,
            buttons=[],
            autoscroll=False,
            placeholder="Attach images and ask about them, or ask for a picture. For example:",
            examples=[_typed(example) for example in examples],
        )
        status = gr.HTML(_status("Ready"), elem_id="status")
        box = gr.MultimodalTextbox(
            label="Question",
            show_label=False,
            placeholder="Ask about an image, or for one",
            file_count="multiple",
            file_types=list(SUFFIXES),
            max_plain_text_length=100_000,
            elem_id="question",
            stop_btn=False,
            autofocus=True,
        )
        with gr.Row(elem_id="choices"):
            why = "" if draws else "This checkpoint has no VQGAN decoder, so it cannot draw; --vqgan gives it one."
            mode = gr.Radio(MODES, value="text", label="Answer with", info=why, interactive=draws, elem_id="mode")
            drawer = gr.Button("Settings", size="sm", elem_id="drawer")
            clear = gr.Button("New conversation", size="sm", elem_id="clear")
        with gr.Sidebar(label="Settings", open=False, position="right", width=360, elem_id="settings"):
            controls = _controls()
        # In the browser, without the server.
        drawer.click(None, js="() => document.querySelector('#settings .toggle-button').click()")
        _wire(page, _Handlers(visitors, examples), (chat, box, status, mode, clear), controls)
    return page


def _controls() -> list[gr.Component]:
    gr.Markdown("## Settings")
    found: list[gr.Component] = []
    for setting, value in zip(settings.SETTINGS, settings.published(), strict=False):
        slider = gr.Slider(
            setting.least, setting.most, value, step=setting.step, label=setting.label, info=setting.info
        )
        found.append(slider)
    found.append(gr.Checkbox(settings.DEFAULTS["greedy"], label="Greedy", info="always the likeliest token"))
    found.append(gr.Textbox("", label="Seed", placeholder="another one each time", max_lines=1))
    reset = gr.Button("Published defaults", elem_id="reset")
    reset.click(settings.published, None, found, **_QUIET)
    return found


class _Handlers:
    """What happens on the page's events; a page's conversation is found by its session hash."""

    def __init__(self, visitors: Visitors, examples: list[dict]):
        self._visitors, self._examples = visitors, examples

    def enter(self, request: gr.Request) -> None:
        self._visitors.enter(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        self._visitors.leave(request.session_hash)

    def stop(self, request: gr.Request) -> None:
        if talk := self._visitors.of(request.session_hash):
            talk.stop()

    def begin(self, request: gr.Request) -> tuple:
        self._visitors.enter(request.session_hash)
        return _ready()

    def choose(self, event: gr.SelectData) -> tuple:
        example = self._examples[event.index]
        return _typed(example), example["mode"]

    def ask(self, request: gr.Request, typed: dict, mode: str, *values) -> Iterator[tuple]:
        talk, note = self._visitors.of(request.session_hash), ""
        if talk is None:
            talk, note = self._visitors.enter(request.session_hash), "; the connection was lost, so this is a new one"
        # Emptied with the first view, so that the next question can be typed meanwhile.
        value = {"value": {"text": "", "files": []}}
        try:
            for view in talk.ask(typed["text"], typed["files"], mode, settings.request_fields(list(values))):
                buttons = {"submit_btn": not view.running, "stop_btn": "Stop" if view.running else False}
                yield _messages(view), gr.update(**value, **buttons), _status(view.status + note, view.running)
                value = {}
            if self._visitors.of(request.session_hash) not in (talk, None):
                # Another conversation was begun meanwhile; what this one yields last is what stays.
                yield _ready()
        except InputError as error:
            box = gr.update(value=typed, submit_btn=True, stop_btn=False)
            yield _messages(talk.view("")), box, _alert(str(error))


def _wire(page: gr.Blocks, handlers: _Handlers, parts: tuple, controls: list) -> None:
    chat, box, status, mode, clear = parts
    page.load(handlers.enter, **_QUIET)
    page.unload(handlers.leave)
    # The dispatcher bounds how many are answered and how many wait; Gradio's own line would hide its place from them.
    line = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "once"}
    box.submit(handlers.ask, [box, mode, *controls], [chat, box, status], **line)
    box.stop(handlers.stop, **_QUIET)
    gr.on([clear.click, chat.clear], handlers.begin, None, [chat, box, status], **_QUIET)
    chat.example_select(handlers.choose, None, [box, mode], **_QUIET)


def _ready() -> tuple:
    """The conversation, the box and the line of a page on which nothing has been asked."""
    return [], gr.update(submit_btn=True, stop_btn=False), _status("Ready")


def _typed(example: dict) -> dict:
    """An example as the value of the box."""
    return {"text": example["text"], "files": [str(EXAMPLES / file) for file in example["files"]]}


def _messages(view: View) -> list[dict]:
    """Turns in the form that gr.Chatbot takes: a message for each text, and one for pictures beside each other.

    All of it is HTML of our own. Gradio's text would be read as HTML, which fetches what an <img> in it names; its
    pictures have no description, and a button that publishes them.
    """
    found = []
    for role, pieces in view.turns:
        for _, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            shown = (piece for piece in group if not isinstance(piece, str) or piece.strip())
            parts = [_text(piece, role) if isinstance(piece, str) else _figure(piece) for piece in shown]
            if parts:
                found.append({"role": role, "content": gr.HTML(f"<div class='pieces'>{''.join(parts)}</div>")})
    return found


def _text(text: str, role: str) -> str:
    # Selected as well, so that it can be copied where a browser keeps programs from its clipboard.
    action = "getSelection().selectAllChildren(this.previousElementSibling); document.execCommand('copy')"
    button = f'<button type="button" onclick="{action}">Copy</button>' if role == "assistant" else ""
    return f'<div class="said"><p class="text">{html.escape(text)}</p>{button}</div>'


def _figure(piece: Picture | Preview) -> str:
    if isinstance(piece, Preview):
        alt = f"Picture, {piece.share:.0%} drawn"
        return f"<figure class='drawn'><img src='{piece.address}' alt='{alt}'><figcaption>{alt}</figcaption></figure>"
    address, alt = f"gradio_api/file={quote(str(piece.path))}", html.escape(piece.alt)
    if not piece.drawn:
        return f"<figure><img src='{address}' alt='{alt}' title='{alt}'></figure>"
    link = f"<a href='{address}' download='{piece.path.name}'>Download (PNG)</a>"
    return f"<figure class='drawn'><img src='{address}' alt='{alt}'><figcaption>{link}</figcaption></figure>"


def _status(line: str, running: bool = False) -> str:
    """The line about what goes on, which screen readers say when it changes."""
    return f"<p role='status' class='{'running' if running else 'idle'}'>{html.escape(line)}</p>"


def _alert(line: str) -> str:
    """The same line with what is wrong."""
    return f"<p role='alert'>{html.escape(line)}</p>"


def launch(
    page: gr.Blocks,
    host: str,
    port: int,
    share: bool,
    auth: list[tuple[str, str]],
    names: Collection[str],
    **limits: int,
) -> str:
    """Serve the page from a thread; its address.

    names: by which it may be called, empty for any. limits: max_file_size in bytes, max_threads for handlers.
    """
    own = {"middleware": [(HostCheck, (), {"names": names})]} if names else None
    # Fonts of the system, so that none is fetched.
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts)
    # Gradio's own greys are too light to be read by everybody.
    theme.set(input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400")
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    page.queue(api_open=False)
    _, address, public = page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=share,
        auth=auth or None,
        theme=theme,
        css_paths=STYLE,
        js=_FOLLOW,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs=own,
        **limits,
    )
    if share and not public:
        raise InputError("--share: Gradio's tunnel cannot be reached; without it the page is on --host and --port")
    return public or address
