"""The chat page: what stands where, and what happens on which event. The texts are in page_text.py."""

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import gradio as gr

from sft.chat.sampling import BOUNDS, Sampling
from sft.web import history
from sft.web.answering import Answering, Progress
from sft.web.history import Conversation, ListFullError, Store
from sft.web.texts import EXAMPLES, LANGUAGES, TEXTS, language_of, say
from sft.web.view import (
    Updates,
    as_history,
    as_message,
    as_messages,
    as_sampling,
    as_updates,
    escape,
    export_link,
    footer,
    merged,
    turn_at,
    visitor_of,
)
from sft.web.visitors import RefusedError

Stream = AsyncIterator[Updates]
DEFAULT = Sampling()
PRESET_NUMBERS = ("temperature", "top_p", "top_k")
PRESETS = {"precise": (0.2, 0.7, 20), "balanced": (0.7, 0.9, 50), "creative": (1.0, 0.95, 0)}
STEPS = {"max_new_tokens": 1, "temperature": 0.05, "top_p": 0.01, "top_k": 1, "repetition_penalty": 0.05}
LATEX = [("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False)]
MAX_PARTIAL = 200  # sessions whose stopped answers are kept until their page asks for them
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
/* HTML of a model's may not lay itself over the page, only over its own bubble. */
.message-content { contain: content; }
@media (max-width: 700px) { .two .chat { height: calc(50dvh - 130px) !important; } }
"""
# How Gradio runs a handler: at once, or in a queue whose order and limits are the waiting line's.
QUICK = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
SLOW = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
BUSY = {"value": "", "submit_btn": False, "stop_btn": True}
READY = {"submit_btn": True, "stop_btn": False}
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]


# The list of conversations stands beside a wide page and would cover a narrow one, so it begins closed.
HEAD = """<script>
const opening = setInterval(() => {
  const button = document.querySelector(".sidebar .toggle-button");
  if (!button) return;
  clearInterval(opening);
  if (window.innerWidth > 900 && !document.querySelector(".sidebar.open")) button.click();
}, 50);
</script>"""


def build_chatbot(name: str) -> gr.Chatbot:
    """Return what shows a conversation with one checkpoint: Markdown, code and LaTeX, and no file."""
    return gr.Chatbot(
        label=name,
        show_label=False,
        buttons=["copy", "copy_all"],
        editable="user",
        latex_delimiters=[dict(zip(("left", "right", "display"), each, strict=True)) for each in LATEX],
        feedback_options=None,
        allow_tags=False,
        elem_classes="chat",
    )


class ChatPage:
    """One page around an `Answering`; `blocks` is what Gradio serves."""

    def __init__(self, answering: Answering, names: Sequence[str]):
        """Build the page; `names` are what the checkpoints are called on it."""
        self.answering = answering
        self.names = list(names)
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
            # A gr.HTML would need the page to be allowed to evaluate strings; this link holds no text of a model's.
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
            # An empty gr.Number comes back as 0.
            self.numbers["seed"] = gr.Textbox(max_length=18, max_lines=1, elem_id="seed")

    def _connect_list(self) -> None:
        """What the list of conversations does."""
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
        self.preset.input(lambda name: PRESETS[name], self.preset, preset, **QUICK)

    def _connect_chat(self) -> None:
        """What sends a question, and what stops an answer."""
        settings = [self.store, *self.numbers.values()]
        outputs = {self.store, self.box, self.status, *self._shown(), *self._held()}
        sent = [self.box.submit(self.on_send, [self.box, *settings], outputs, **SLOW)]
        for chatbot in self.chatbots:
            sent.append(chatbot.retry(self.on_retry, settings, outputs, **SLOW))
            sent.append(chatbot.edit(self.on_edit, settings, outputs, **SLOW))
            sent.append(chatbot.example_select(self.on_example, settings, outputs, **SLOW))
            chatbot.undo(self.on_undo, self.store, outputs, **QUICK)
            # Its waste bin takes the conversation off the page and leaves it in the list.
            chatbot.clear(self.changing(history.start_new), self.store, {self.store, *self._shown()}, **QUICK)
        for event in sent:
            event.then(self.on_end, self.store, outputs, **QUICK)
        self.box.stop(None, None, None, cancels=sent, api_visibility="private")

    def _shown(self) -> list[gr.components.Component]:
        """The components that show the store."""
        return [self.list, self.title, self.export, self.delete, self.confirming, *self.chatbots]

    def _held(self) -> list[gr.components.Component]:
        """The components that change the store, and wait while an answer is written into it."""
        return [self.new, self.list, self.title, self.delete, self.confirm, self.language]

    def _labelled(self) -> list[gr.components.Component]:
        """The components whose words are another language's."""
        return [
            *(self.new, self.list, self.title, self.delete, self.confirm, self.cancel, self.language),
            *(self.box, self.settings, self.preset, *self.numbers.values(), *self.chatbots, self.status),
        ]

    def show(self, store: Store) -> Updates:
        """Return what shows a store."""
        conversation = history.opened(store)
        is_open = conversation is not None
        language = store["language"] or "en"
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
        """Return what puts the page into a language."""
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
        """Show what the browser has kept, in its language."""
        store = history.checked(store)
        store["language"] = store["language"] or language_of(request.headers.get("accept-language", ""))
        return as_updates(merged(self.show(store), self.words(store["language"])))

    def on_language(self, store: Store, language: str) -> Updates:
        """Change the language."""
        store = history.checked(store)
        store["language"] = language if language in LANGUAGES else "en"
        return as_updates(merged(self.show(store), self.words(store["language"])))

    def changing(self, change: Callable[..., Store]) -> Callable[..., Updates]:
        """Return the handler of an event that changes the store by `change`."""
        return lambda store, *values: as_updates(self.show(change(history.checked(store), *values)))

    async def on_send(self, request: gr.Request, question: str, store: Store, *settings: float | str) -> Stream:
        """Answer what was typed."""
        async for updates in self.respond(history.checked(store), question, None, settings, request):
            yield updates

    async def on_example(
        self, request: gr.Request, event: gr.SelectData, store: Store, *settings: float | str
    ) -> Stream:
        """Answer an example."""
        async for updates in self.respond(history.checked(store), event.value["text"], None, settings, request):
            yield updates

    async def on_retry(self, request: gr.Request, event: gr.RetryData, store: Store, *settings: float | str) -> Stream:
        """Answer a question once more."""
        store = history.checked(store)
        number = turn_at(history.opened(store), event.index)
        _, question = history.take_back(store, number)
        async for updates in self.respond(store, question, number, settings, request):
            yield updates

    async def on_edit(self, request: gr.Request, event: gr.EditData, store: Store, *settings: float | str) -> Stream:
        """Answer a question that was changed."""
        store = history.checked(store)
        number = turn_at(history.opened(store), event.index)
        question = event.value if number >= 0 else ""  # a turn that is not there, which only a forger names
        async for updates in self.respond(store, question, number, settings, request):
            yield updates

    def on_undo(self, store: Store, event: gr.UndoData) -> Updates:
        """Take a question back into the box."""
        store = history.checked(store)
        store, question = history.take_back(store, turn_at(history.opened(store), event.index))
        return as_updates(self.show(store) | {self.box: {"value": question}})

    async def respond(
        self, store: Store, question: str, number: int | None, settings: Sequence[float | str], request: gr.Request
    ) -> Stream:
        """Yield the page's updates while a question, behind all turns or in the place of one, is answered."""
        self.sweep()
        language, visitor = store["language"] or "en", visitor_of(request)
        typed = {self.box: {"value": history.well_formed(question) if number is None else "", **READY}}
        try:
            asked = history.ask(store, question, number)
            conversation = history.opened(asked)
            told = [history.messages(conversation, i) for i in range(len(self.chatbots))]
            sampling = as_sampling(dict(zip(self.numbers, settings, strict=True)))
            begun = False
            async with aclosing(self.answering.answer(visitor, told, sampling)) as progresses:
                async for progress in progresses:
                    if not begun:
                        held = {component: {"interactive": False} for component in self._held()}
                        yield as_updates(merged(self.show(asked), held, {self.box: BUSY}))
                        begun = True
                    self._remember(visitor.session, progress)
                    yield as_updates(self._streamed(conversation, progress, language))
            self.partial.pop(visitor.session, None)
            if not progress.finished:
                return
            answered = history.answer(asked, progress.answers)
            yield as_updates(self.show(answered) | {self.status: {"value": footer(self.names, progress, language)}})
        except RefusedError as refused:
            sentence = say(language, refused.key, **refused.values)
            yield as_updates(self.show(store) | typed | {self.status: {"value": sentence}})
        except ListFullError:
            yield as_updates(self.show(store) | typed | {self.status: {"value": say(language, "list_full")}})
        except Exception:
            logging.getLogger(__name__).exception("an answer ended in an error")
            yield as_updates(typed | {self.status: {"value": say(language, "failed")}})

    def _streamed(self, conversation: Conversation, progress: Progress, language: str) -> Updates:
        """Return what shows an answer that grows, or the place in the line."""
        if progress.ahead:
            return {self.status: {"value": say(language, "waiting", ahead=progress.ahead)}}
        updates = {self.status: {"value": footer(self.names, progress, language)}}
        for number, (chatbot, answer) in enumerate(zip(self.chatbots, progress.answers, strict=False)):
            updates[chatbot] = {"value": [*as_messages(conversation, number), as_message("assistant", answer)]}
        return updates

    def _remember(self, session: str, progress: Progress) -> None:
        """Keep how far an answer is, should it be stopped."""
        if any(progress.answers):
            self.partial[session] = progress
            if len(self.partial) > MAX_PARTIAL:
                self.partial.popitem(last=False)

    def sweep(self) -> None:
        """Drop what Gradio keeps for sessions that nobody listens to, as it does itself where a stream is closed."""
        queue = self.blocks._queue
        busy = {event.session_hash for event in queue.event_ids_to_events.values()}
        for session in {*queue.pending_messages_per_session, *queue.pending_event_ids_session} - busy:
            if self.answering.is_gone(session, *queue.pending_event_ids_session.get(session, ())):
                queue.pending_messages_per_session.pop(session, None)
                queue.pending_event_ids_session.pop(session, None)

    def on_end(self, store: Store, request: gr.Request) -> Updates:
        """Make the box ready again, and keep what there is of an answer that was stopped."""
        store = history.checked(store)
        ready: Updates = {self.box: READY, **{component: {"interactive": True} for component in self._held()}}
        progress = self.partial.pop(request.session_hash, None)
        if progress is not None:
            status = {self.status: {"value": footer(self.names, progress, store["language"] or "en", stopped=True)}}
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
        """Answer a message behind a history of {"role", "content"} turns; the first checkpoint's reply, growing."""
        self.sweep()
        language = language_of(request.headers.get("accept-language", ""))
        try:
            sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
            told = [*as_history(history), {"role": "user", "content": message}]
            async with aclosing(self.answering.answer(visitor_of(request), [told], sampling)) as progresses:
                async for progress in progresses:
                    yield progress.answers[0] if progress.answers else ""
        except RefusedError as refused:
            raise gr.Error(say(language, refused.key, **refused.values), print_exception=False) from None
