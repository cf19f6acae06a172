"""Chat with a checkpoint in the browser.

    python app.py --checkpoint output_dir/demo [--port 7860]

The page speaks the browser's language, Chinese or English. It answers on this machine only (127.0.0.1).
"""

from collections.abc import Callable, Iterator
from contextlib import closing

import gradio as gr

from sft.chat import ChatModel, Sampling
from sft.program import ArgumentParser, UserError, run_program

TRANSLATIONS = {
    "en": {
        "settings": "Sampling",
        "max_new_tokens": "Longest answer (tokens)",
        "temperature": "Temperature (0: always the likeliest token)",
        "top_p": "Top p",
        "top_k": "Top k",
        "repetition_penalty": "Repetition penalty",
        "ask": "Ask something",
        "examples": "Examples",
    },
    "zh": {
        "settings": "采样设置",
        "max_new_tokens": "回答的最大长度（token）",
        "temperature": "温度（0：总是取概率最大的 token）",
        "top_p": "Top p",
        "top_k": "Top k",
        "repetition_penalty": "重复惩罚",
        "ask": "问点什么",
        "examples": "示例",
    },
}
TRANSLATIONS["zh-CN"] = TRANSLATIONS["zh"]  # gradio looks a browser's locale up as it stands
EXAMPLES = [
    "用一句话介绍一下你自己。",
    "写一首关于秋天的五言绝句。",
    "一件商品原价 120 元，打八折后是多少元？",
    "用 Python 写一个函数，判断一个数是不是质数。",
    "Translate into English: 千里之行，始于足下。",
]


def answer_with(chat: ChatModel) -> Callable[..., Iterator[str]]:
    """Return the function behind the chat: it yields the growing reply and ends generation when it is closed."""

    def respond(
        message: str,
        history: list[dict],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
    ) -> Iterator[str]:
        sampling = Sampling(int(max_new_tokens), temperature, top_p, int(top_k), repetition_penalty)
        messages = [*answered(history), {"role": "user", "content": message}]
        reply = ""
        with closing(iter(chat.reply(messages, sampling))) as pieces:
            for piece in pieces:
                reply += piece
                yield reply
        if not reply:
            yield reply  # the model ended at once

    return respond


def answered(history: list[dict]) -> list[dict[str, str]]:
    """Return the turns of gradio's history without questions that were stopped before an answer came."""
    turns = [{"role": turn["role"], "content": text_of(turn["content"])} for turn in history]
    roles = [turn["role"] for turn in turns[1:]] + ["user"]
    return [turn for turn, following in zip(turns, roles, strict=False) if turn["role"] != following]


def text_of(content: str | list[dict]) -> str:
    """Return the text of a message as gradio keeps it: a string, or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def build_page(chat: ChatModel, title: str) -> gr.ChatInterface:
    """Build the page around a loaded checkpoint; one answer is generated at a time, others wait their turn."""
    i18n = gr.I18n(**TRANSLATIONS)
    default = Sampling()
    return gr.ChatInterface(
        answer_with(chat),
        title=title,
        chatbot=gr.Chatbot(height="70vh", show_label=False, buttons=["copy"]),
        textbox=gr.Textbox(
            placeholder=i18n("ask"), show_label=False, container=False, submit_btn=True, stop_btn=True, autofocus=True
        ),
        additional_inputs_accordion=gr.Accordion(i18n("settings"), open=False),
        additional_inputs=[
            gr.Slider(1, 2048, default.max_new_tokens, step=1, label=i18n("max_new_tokens")),
            gr.Slider(0, 2, default.temperature, step=0.05, label=i18n("temperature")),
            gr.Slider(0.05, 1, default.top_p, step=0.05, label=i18n("top_p")),
            gr.Slider(0, 200, default.top_k, step=1, label=i18n("top_k")),
            gr.Slider(1, 2, default.repetition_penalty, step=0.05, label=i18n("repetition_penalty")),
        ],
        examples=[[example] for example in EXAMPLES],
        examples_label=i18n("examples"),
        run_examples_on_click=False,
        cache_examples=False,
        flagging_mode="never",
        analytics_enabled=False,
        concurrency_limit=1,
        api_name="chat",
    )


def main() -> None:
    """Load the checkpoint and serve the page until interrupted."""
    parser = ArgumentParser(description="Chat with a checkpoint in the browser.")
    parser.add_argument("--checkpoint", required=True, help="a model folder or a hub id")
    parser.add_argument("--port", type=int, default=7860, help="the port on 127.0.0.1")
    arguments = parser.parse_args()
    chat = ChatModel.load(arguments.checkpoint)
    page = build_page(chat, arguments.checkpoint)
    print(f"{arguments.checkpoint} on {chat.model.device}: http://127.0.0.1:{arguments.port} (Ctrl-C ends)", flush=True)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=arguments.port,
            share=False,
            quiet=True,
            i18n=gr.I18n(**TRANSLATIONS),
        )
    except OSError as error:
        raise UserError(f"--port {arguments.port} cannot be used ({error}); give another") from None


if __name__ == "__main__":
    run_program(main)
