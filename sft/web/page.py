"""The chat page: its layout, and what happens on each event. The texts are in texts.py."""

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import gradio as gr

from sft.chat.sampling import BOUNDS, Sampling
from sft.web import history
from sft.web.answering import Answering, Progress
from sft.web.history import Store
from sft.web.markdown import BEGIN, END, LATEX, RAW, escape
from sft.web.texts import DEFAULT_LANGUAGE, EXAMPLES, LANGUAGES, TEXTS, RefusedError, language_of, say
from sft.web.view import (
    Updates,
    as_history,
    as_message,
    as_messages,
    as_sampling,
    as_updates,
    export_link,
    footer,
    merged,
    turn_at,
    visitor_of,
)
from sft.web.visitors import Visitor

Stream = AsyncIterator[Updates]
DEFAULT = Sampling()
PRESET_NUMBERS = ("temperature", "top_p", "top_k")
PRESETS = {"precise": (0.2, 0.7, 20), "balanced": (0.7, 0.9, 50), "creative": (1.0, 0.95, 0)}
STEPS = {"max_new_tokens": 1, "temperature": 0.05, "top_p": 0.01, "top_k": 1, "repetition_penalty": 0.05}
MAX_PARTIAL = 200  # sessions whose stopped answers are kept until their page fetches them
STORAGE_KEY = "chinese_bloom_conversations"
CSS = """
.name h1 { font-size: 1.1rem; margin: 0 44px 0 0; overflow-wrap: anywhere; }
#conversations .wrap { flex-direction: column; flex-wrap: nowrap; max-height: 45vh; overflow-y: auto; gap: 4px; }
#conversations label { width: 100%; } #conversations input { display: none; }
#conversations span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#export a { display: block; text-align: center; padding: 8px; border-radius: 8px; text-decoration: none;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color); font-size: var(--text-sm); }
#status { min-height: 1.6em; font-size: var(--text-sm); color: var(--body-text-color-subdued); }
.chat { height: calc(100dvh - 240px) !important; min-height: 260px; }
/* A formula may cover its own bubble, but not the page. */
.message-content { contain: content; }
@media (max-width: 700px) { .two .chat { height: calc(50dvh - 130px) !important; } }
"""
# How Gradio runs a handler: at once, or queued without a limit; order and limits are the waiting line's.
QUICK = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
SLOW = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
BUSY = {"value": "", "submit_btn": False, "stop_btn": True}
READY = {"submit_btn": True, "stop_btn": False}
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]


# The list of conversations fits beside a wide page but would cover a narrow one, so it starts closed. What is copied of
# a message, or edited, is its text, not what shows it.
HEAD = f"""<script>{{
const shown = /{BEGIN}[^]*?{RAW}(.*?){END}/g;
const raw = text => text.replace(shown, (_, encoded) => decodeURIComponent(encoded));
const write = navigator.clipboard?.writeText.bind(navigator.clipboard);
if (write) navigator.clipboard.writeText = text => write(raw(text));
document.addEventListener("copy", event => {{
  if (!event.target.value?.includes("{BEGIN}")) return;
  event.clipboardData.setData("text/plain", raw(event.target.value));
  event.preventDefault();
}});
document.addEventListener("click", () => setTimeout(() => {{
  for (const box of document.querySelectorAll(".message textarea")) {{
    if (!box.value.includes("{BEGIN}")) continue;
    box.value = raw(box.value);
    box.dispatchEvent(new Event("input", {{ bubbles: true }}));
  }}
}}));
const opening = setInterval(() => {{
  const button = document.querySelector(".sidebar .toggle-button");
  if (!button) return;
  clearInterval(opening);
  if (window.innerWidth > 900 && !document.querySelector(".sidebar.open")) button.click();
}}, 50);
}}</script>"""


def build_chatbot(name: str) -> gr.Chatbot:
    """Return the view of a conversation with one checkpoint: Markdown, code and LaTeX, but no files."""
    return gr.Chatbot(
        label=name,
        show_label=False,
        buttons=["copy", "copy_all"],
        editable="user",
        latex_delimiters=LATEX,
        feedback_options=None,
        allow_tags=False,
        elem_classes="chat",
    )


def preset_numbers(name: object) -> tuple[float, float, int]:
    """Return the temperature, top p and top k of a preset; for an unknown name those of "balanced"."""
    return PRESETS[name if isinstance(name, str) and name in PRESETS else "balanced"]


class ChatPage:
    """One page around an `Answering`; `blocks` is what Gradio serves."""

    def __init__(self, answering: Answering, names: Sequence[str]):
        """Build the page; `names` are the checkpoints' headings."""
        self.answering = answering
        self.names = list(names)
        self.labels = [f"{name}: {chat}" for name, chat in zip(names, answering.chats, strict=True)]
        self.partial: OrderedDict[str, Progress] = OrderedDict()
        with gr.Blocks(title="chinese_bloom", fill_width=True, analytics_enabled=False) as self.blocks:
            self.store = gr.BrowserState(history.blank(), storage_key=STORAGE_KEY, secret=STORAGE_KEY)
            self._build_sidebar()
            self._build_chat()
            self._build_settings()
            self._connect_list()
            self._connect_chat()
            gr.api(self.chat, api_name="chat", concurrency_limit=None)

    def _build_sidebar(self) -> None:
        with gr.Sidebar(width=280, open=False):
            self.new = gr.Button(variant="secondary")
            self.list = gr.Radio([], elem_id="conversations", container=False, interactive=True)
            self.title = gr.Textbox(max_length=72, max_lines=1, submit_btn="✓", visible=False, elem_id="title")
            # gr.HTML would need a policy that allows evaluating strings; this link contains no text by a model.
            self.export = gr.Markdown(elem_id="export", visible=False, sanitize_html=False)
            self.delete = gr.Button(size="sm", visible=False, elem_id="delete")
            with gr.Row(visible=False) as self.confirming:
                self.confirm = gr.Button(size="sm", variant="stop", elem_id="confirm")
                self.cancel = gr.Button(size="sm")
            choices = [(name, language) for language, name in LANGUAGES.items()]
            self.language = gr.Radio(choices, interactive=True, elem_id="language")

    def _build_chat(self) -> None:
        self.chatbots = []
        with gr.Row(elem_classes="two" if len(self.names) > 1 else None):
            for name in self.names:
                with gr.Column(min_width=300):
                    gr.Markdown(f"# {escape(name)}", elem_classes="name")
                    self.chatbots.append(build_chatbot(name))
        self.box = gr.Textbox(
            show_label=False, container=False, autofocus=True, submit_btn=True, elem_id="box", max_lines=8
        )
        self.status = gr.Markdown(elem_id="status")

    def _build_settings(self) -> None:
        with gr.Accordion(open=False, elem_id="settings") as self.settings:
            self.preset = gr.Radio(list(PRESETS), value="balanced", interactive=True, elem_id="preset")
            self.numbers = {}
            for name, step in STEPS.items():
                least, most = BOUNDS[name]
                most = self.answering.limits.max_new_tokens if name == "max_new_tokens" else most
                value = min(getattr(DEFAULT, name), most)
                self.numbers[name] = gr.Slider(least, most, value, step=step, elem_id=name)
            # An empty gr.Number would return 0.
            self.numbers["seed"] = gr.Textbox(max_length=18, max_lines=1, elem_id="seed")

    def _connect_list(self) -> None:
        """Connect the list of conversations, the language and the presets."""
        shown = {self.store, *self._shown()}
        loaded = {self.store, *self._shown(), *self._labelled()}
        self.blocks.load(self.on_load, self.store, loaded, **QUICK)
        self.language.input(self.on_language, [self.store, self.language], loaded, preprocess=False, **QUICK)
        self.new.click(self.changing(history.start_new), self.store, shown, **QUICK)
        self.list.input(self.changing(history.open_one), [self.store, self.list], shown, preprocess=False, **QUICK)
        self.title.submit(self.changing(history.rename), [self.store, self.title], shown, **QUICK)
        asking = {self.confirming: {"visible": True}, self.delete: {"visible": False}}
        not_asking = {self.confirming: {"visible": False}, self.delete: {"visible": True}}
        self.delete.click(lambda: as_updates(asking), None, set(asking), **QUICK)
        self.cancel.click(lambda: as_updates(not_asking), None, set(asking), **QUICK)
        self.confirm.click(self.changing(history.delete), self.store, shown, **QUICK)
        preset = [self.numbers[name] for name in PRESET_NUMBERS]
        self.preset.input(preset_numbers, self.preset, preset, preprocess=False, **QUICK)

    def _connect_chat(self) -> None:
        """Connect what sends a question and what stops an answer."""
        settings = [self.store, *self.numbers.values()]
        outputs = {self.store, self.box, self.status, *self._shown(), *self._held()}
        sent = [self.box.submit(self.on_send, [self.box, *settings], outputs, **SLOW)]
        for chatbot in self.chatbots:
            sent.append(chatbot.retry(self.on_retry, settings, outputs, **SLOW))
            sent.append(chatbot.edit(self.on_edit, settings, outputs, **SLOW))
            sent.append(chatbot.example_select(self.on_example, settings, outputs, **SLOW))
            chatbot.undo(self.on_undo, self.store, outputs, **QUICK)
            # Its bin clears the page but keeps the conversation in the list.
            chatbot.clear(self.changing(history.start_new), self.store, {self.store, *self._shown()}, **QUICK)
        for event in sent:
            event.then(self.on_end, self.store, outputs, **QUICK)
        self.box.stop(None, None, None, cancels=sent, api_visibility="private")

    def _shown(self) -> list[gr.components.Component]:
        """The components that show the store."""
        return [self.list, self.title, self.export, self.delete, self.confirming, *self.chatbots]

    def _held(self) -> list[gr.components.Component]:
        """The components that change the store; they are disabled while an answer is written into it."""
        return [self.new, self.list, self.title, self.delete, self.confirm, self.language]

    def _labelled(self) -> list[gr.components.Component]:
        """The components whose words depend on the language."""
        return [
            *(self.new, self.list, self.title, self.delete, self.confirm, self.cancel, self.language),
            *(self.box, self.settings, self.preset, *self.numbers.values(), *self.chatbots, self.status),
        ]

    def show(self, store: Store) -> Updates:
        """Return the updates that show a store."""
        conversation = history.opened(store)
        is_open = conversation is not None
        language = history.language_of(store)
        choices = [(each["title"] or "…", each["id"]) for each in store["conversations"]]
        updates = {
            self.store: {"value": store},
            self.list: {"choices": choices, "value": store["open"]},
            self.title: {"value": conversation["title"] if is_open else "", "visible": is_open},
            self.export: {"value": export_link(conversation, language) if is_open else "", "visible": is_open},
            self.delete: {"visible": is_open},
            self.confirming: {"visible": False},
        }
        for number, chatbot in enumerate(self.chatbots):
            updates[chatbot] = {"value": as_messages(conversation, number) if is_open else []}
        return updates

    def words(self, language: str) -> Updates:
        """Return the updates that switch the page to a language."""
        text = TEXTS[language]
        labelled = {self.title: "title", self.language: "language", self.settings: "settings", self.preset: "preset"}
        labelled |= {component: name for name, component in self.numbers.items()}
        updates = {component: {"label": text[name]} for component, name in labelled.items()}
        buttons = {self.delete: "delete", self.confirm: "confirm", self.cancel: "cancel"}
        updates |= {button: {"value": text[name]} for button, name in buttons.items()}
        updates[self.new] = {"value": f"＋ {text['new']}"}
        updates[self.box] = {"placeholder": text["ask"]}
        updates[self.status] = {"value": ""}
        updates[self.language] |= {"value": language}
        updates[self.preset] |= {"choices": [(text[name], name) for name in PRESETS]}
        examples = [{"text": example} for example in EXAMPLES[language]]
        for chatbot in self.chatbots:
            updates[chatbot] = {"placeholder": text["empty_page"], "examples": examples}
        return updates

    def on_load(self, store: Store, request: gr.Request) -> Updates:
        """Show the conversations that the browser has kept, in its language."""
        store = history.checked(store)
        store["language"] = store["language"] or language_of(request.headers.get("accept-language", ""))
        return as_updates(merged(self.show(store), self.words(store["language"])))

    def on_language(self, store: Store, language: str) -> Updates:
        """Change the language."""
        store = history.checked(store)
        store["language"] = language if language in LANGUAGES else DEFAULT_LANGUAGE
        return as_updates(merged(self.show(store), self.words(store["language"])))

    def changing(self, change: Callable[..., Store]) -> Callable[..., Updates]:
        """Return an event handler that applies `change` to the store."""
        return lambda store, *values: as_updates(self.show(change(history.checked(store), *values)))

    async def on_send(self, request: gr.Request, question: str, store: Store, *settings: float | str) -> Stream:
        """Answer the question in the box."""
        async for updates in self.respond(history.checked(store), question, None, settings, request):
            yield updates

    async def on_example(
        self, request: gr.Request, event: gr.SelectData, store: Store, *settings: float | str
    ) -> Stream:
        """Answer an example."""
        async for updates in self.respond(history.checked(store), event.value["text"], None, settings, request):
            yield updates

    async def on_retry(self, request: gr.Request, event: gr.RetryData, store: Store, *settings: float | str) -> Stream:
        """Answer a question again."""
        store = history.checked(store)
        number = turn_at(history.opened(store), event.index)
        _, question = history.take_back(store, number)
        async for updates in self.respond(store, question, number, settings, request):
            yield updates

    async def on_edit(self, request: gr.Request, event: gr.EditData, store: Store, *settings: float | str) -> Stream:
        """Answer an edited question."""
        store = history.checked(store)
        number = turn_at(history.opened(store), event.index)
        question = event.value if number >= 0 else ""  # only a forged event names a turn that does not exist
        async for updates in self.respond(store, question, number, settings, request):
            yield updates

    def on_undo(self, store: Store, event: gr.UndoData) -> Updates:
        """Move a question back into the box."""
        store = history.checked(store)
        store, question = history.take_back(store, turn_at(history.opened(store), event.index))
        return as_updates(self.show(store) | {self.box: {"value": question}})

    async def respond(
        self, store: Store, question: str, number: int | None, settings: Sequence[float | str], request: gr.Request
    ) -> Stream:
        """Yield the page's updates while a question is answered, and say why if it is not.

        The question goes behind all turns, or replaces turn `number` and all turns after it.
        """
        self.sweep()
        language = history.language_of(store)
        typed = {self.box: {"value": history.well_formed(question) if number is None else "", **READY}}
        try:
            self.answering.check_question(question)
            asked = history.ask(store, question, number)
            sampling = as_sampling(dict(zip(self.numbers, settings, strict=True)))
            async with aclosing(self._answer(asked, sampling, visitor_of(request))) as stream:
                async for updates in stream:
                    yield as_updates(updates)
        except RefusedError as refused:
            yield as_updates(self.show(store) | typed | {self.status: {"value": refused.sentence(language)}})
        except Exception:
            logging.getLogger(__name__).exception("an answer ended in an error")
            yield as_updates(typed | {self.status: {"value": say(language, "failed")}})

    async def _answer(self, asked: Store, sampling: Sampling, visitor: Visitor) -> AsyncIterator[Updates]:
        """Yield updates while the last question of a store is answered, and finally the store with its answers."""
        language, conversation = history.language_of(asked), history.opened(asked)
        messages = [history.messages(conversation, i) for i in range(len(self.chatbots))]
        before = [as_messages(conversation, i) for i in range(len(self.chatbots))]
        async with aclosing(self.answering.answer(visitor, messages, sampling)) as progresses:
            progress = await anext(progresses)  # here it is refused, if it is
            yield merged(self._busy(asked), self._streamed(before, progress, language))
            async for progress in progresses:
                self._remember(visitor.session, progress)
                yield self._streamed(before, progress, language)
        self.partial.pop(visitor.session, None)
        if progress.finished:
            answered = self.show(history.answer(asked, progress.answers))
            yield answered | {self.status: {"value": footer(self.labels, progress, language)}}

    def _busy(self, asked: Store) -> Updates:
        """Return what shows a question, and holds what would change the store while it is answered."""
        held = {component: {"interactive": False} for component in self._held()}
        return merged(self.show(asked), held, {self.box: BUSY})

    def _streamed(self, before: Sequence[list[dict]], progress: Progress, language: str) -> Updates:
        """Return the updates that show a growing answer behind the messages before it, or the place in the queue."""
        if progress.ahead:
            words = "waiting" if self.answering.line.at_once > 1 else "waiting_in_turn"
            return {self.status: {"value": say(language, words, ahead=progress.ahead)}}
        updates = {self.status: {"value": footer(self.labels, progress, language)}}
        for chatbot, messages, answer in zip(self.chatbots, before, progress.answers, strict=False):
            updates[chatbot] = {"value": [*messages, as_message("assistant", answer)]}
        return updates

    def _remember(self, session: str, progress: Progress) -> None:
        """Keep the answer so far, in case it is stopped."""
        if any(progress.answers):
            self.partial[session] = progress
            if len(self.partial) > MAX_PARTIAL:
                self.partial.popitem(last=False)

    def sweep(self) -> None:
        """Drop what Gradio keeps for sessions without a listener, as it does itself when a stream is closed."""
        queue = self.blocks._queue
        busy = {event.session_hash for event in queue.event_ids_to_events.values()}
        for session in {*queue.pending_messages_per_session, *queue.pending_event_ids_session} - busy:
            if self.answering.is_gone(session, *queue.pending_event_ids_session.get(session, ())):
                queue.pending_messages_per_session.pop(session, None)
                queue.pending_event_ids_session.pop(session, None)

    def on_end(self, store: Store, request: gr.Request) -> Updates:
        """Make the box ready again, and keep what was written of a stopped answer."""
        store = history.checked(store)
        ready: Updates = {self.box: READY, **{component: {"interactive": True} for component in self._held()}}
        progress = self.partial.pop(request.session_hash, None)
        if progress is not None:
            status = {self.status: {"value": footer(self.labels, progress, history.language_of(store), stopped=True)}}
            ready = merged(ready, self.show(history.answer(store, progress.answers)), status)
        return as_updates(ready)

    async def chat(
        self,
        message: str,
        history: list[dict[str, str]] | None = None,
        max_new_tokens: int = DEFAULT.max_new_tokens,
        temperature: float = DEFAULT.temperature,
        top_p: float = DEFAULT.top_p,
        top_k: int = DEFAULT.top_k,
        repetition_penalty: float = DEFAULT.repetition_penalty,
        seed: int | None = None,
        request: gr.Request = None,
    ) -> AsyncIterator[str]:
        """Answer a message after a history of {"role", "content"} turns: the first checkpoint's reply as it grows."""
        self.sweep()
        language = language_of(request.headers.get("accept-language", ""))
        try:
            sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
            messages = [*as_history(history), {"role": "user", "content": message}]
            async with aclosing(self.answering.answer(visitor_of(request), [messages], sampling)) as progresses:
                async for progress in progresses:
                    yield progress.answers[0] if progress.answers else ""
        except RefusedError as refused:
            raise gr.Error(refused.sentence(language), print_exception=False) from None
