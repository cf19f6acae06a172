"""The prompt: its text is in this file and nowhere else. Standard library only.

The two templates are Stanford Alpaca's, to the letter (https://github.com/tatsu-lab/stanford_alpaca, Apache-2.0):
one for a task with an input, one for a task without. A conversation of one turn is a task without input; a longer one
is written the way BelleGroup's multiturn_chat_0.8M writes it, in place of the instruction.
"""

from collections.abc import Sequence

PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
# Who speaks in a conversation of several turns, at the start of a line.
HUMAN, ASSISTANT = "Human:", "Assistant:"
# A reply that contains one of these has started to write the next turn itself.
STOP_MARKERS = ("\n### Instruction", "\nHuman:")


def build_prompt(instruction: str, input: str = "") -> str:
    """Return the prompt of one task; the answer follows directly."""
    if input:
        return PROMPT_INPUT.format(instruction=instruction, input=input)
    return PROMPT_NO_INPUT.format(instruction=instruction)


def split_prompt(instruction: str, input: str = "") -> list[str]:
    """Return `build_prompt(instruction, input)` in parts: the template's text and, in between, the user's.

    The user's parts, every second one, begin with one newline and end with two, so that parts meet between ":" and a
    newline, or between a newline and "#".
    """
    if not input:
        return [_BEFORE, f"\n{instruction}\n\n", _RESPONSE]
    return [_BEFORE_INPUT, f"\n{instruction}\n\n", _INPUT, f"\n{input}\n\n", _RESPONSE]


_BEFORE, _RESPONSE = PROMPT_NO_INPUT.split("\n{instruction}\n\n")
_BEFORE_INPUT, _INPUT = PROMPT_INPUT.split("\n{input}\n\n")[0].split("\n{instruction}\n\n")


def body_spans(instruction: str, input: str = "") -> list[tuple[int, int]]:
    """Return where the user's text is in `build_prompt(instruction, input)`.

    Each span is (first character, one past the last), in the order in which they may be shortened: the input before
    the instruction, since the instruction names the task.
    """
    if not input:
        start = PROMPT_NO_INPUT.index("{instruction}")
        return [(start, start + len(instruction))]
    start = PROMPT_INPUT.index("{instruction}")
    between = PROMPT_INPUT.index("{input}") - start - len("{instruction}")
    input_start = start + len(instruction) + between
    return [(input_start, input_start + len(input)), (start, start + len(instruction))]


def build_chat_prompt(messages: Sequence[dict[str, str]]) -> str:
    """Return the prompt for the assistant's next reply.

    `messages` are {"role", "content"} in turns: at most one "system" first, then "user" and "assistant" by turns,
    "user" last. Raises ValueError on any other order.
    """
    system, turns = split_system(messages)
    contents = [turn["content"] for turn in turns]
    return build_prompt(chat_instruction(system, [*zip(contents[:-1:2], contents[1::2], strict=True)], contents[-1]))


def chat_instruction(system: str, history: Sequence[tuple[str, str]], question: str) -> str:
    """Return a conversation in place of the instruction: the questions and replies so far, then one question.

    Without history that is only the question; `system` comes first, unchanged.
    """
    if not history:
        return system + question
    return f"{system}{''.join(map(write_turn, history))}{HUMAN}{question}\n{ASSISTANT}"


def write_turn(turn: tuple[str | None, str]) -> str:
    """Return a question and its reply as they appear in the history; an opening by the assistant has no question."""
    question, reply = turn
    return f"{HUMAN}{question}\n{ASSISTANT}{reply}\n" if question is not None else f"{ASSISTANT}{reply}\n"


def split_system(messages: Sequence[dict[str, str]]) -> tuple[str, Sequence[dict[str, str]]]:
    """Split off the system message, ended by a newline ("" if there is none), and check the order of the rest."""
    system, turns = "", messages
    if messages and messages[0]["role"] == "system":
        system, turns = messages[0]["content"] + "\n", messages[1:]
    expected = ["user", "assistant"] * len(turns)
    roles = [turn["role"] for turn in turns]
    if len(roles) % 2 == 0 or roles != expected[: len(roles)]:
        raise ValueError(f"a conversation alternates user and assistant and ends with user; got {roles}")
    return system, turns


def chat_template(bos_token: str = "", eos_token: str = "") -> str:
    """Return `build_chat_prompt` as a Jinja template, the form in which a tokenizer carries it.

    `bos_token` comes first, for tokenizers that begin every text with one. If the messages end in an assistant's
    reply, the template adds that reply and `eos_token`.
    """
    before, after = PROMPT_NO_INPUT.split("{instruction}")
    return (
        _JINJA.replace("BEFORE", _quote(bos_token + before))
        .replace("AFTER", _quote(after))
        .replace("EOS", _quote(eos_token))
    )


def ollama_template() -> str:
    """Return `build_chat_prompt` as a template of Go, the form in which Ollama takes it."""
    before, after = PROMPT_NO_INPUT.split("{instruction}")
    return _GO.replace("BEFORE", before).replace("AFTER", after)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


_JINJA = """\
{%- set system = messages[0].content + "\\n" if messages and messages[0].role == "system" else "" -%}
{%- set turns = messages[1:] if system else messages -%}
{%- set answered = turns and turns[-1].role == "assistant" -%}
{%- set asked = turns[:-1] if answered else turns -%}
{%- if asked | length % 2 == 0 -%}
    {{- raise_exception("a conversation alternates user and assistant and begins with user") -}}
{%- endif -%}
{{- BEFORE + system -}}
{%- for turn in asked -%}
    {%- if turn.role != ("user" if loop.index0 % 2 == 0 else "assistant") -%}
        {{- raise_exception("a conversation alternates user and assistant and begins with user") -}}
    {%- endif -%}
    {%- if asked | length == 1 -%}
        {{- turn.content -}}
    {%- else -%}
        {{- ("Human:" if turn.role == "user" else "Assistant:") + turn.content + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if asked | length > 1 -%}{{- "Assistant:" -}}{%- endif -%}
{{- AFTER -}}
{%- if answered -%}{{- turns[-1].content + EOS -}}{%- endif -%}
"""

# With several turns the last one is still to be answered, and each has its speaker.
_GO = """\
{{- $several := false -}}
{{- range .Messages }}{{ if eq .Role "assistant" }}{{ $several = true }}{{ end }}{{ end -}}
BEFORE{{ if .System }}{{ .System }}
{{ end }}{{ range .Messages -}}
{{ if eq .Role "user" }}{{ if $several }}Human:{{ .Content }}
{{ else }}{{ .Content }}{{ end -}}
{{ else if eq .Role "assistant" }}Assistant:{{ .Content }}
{{ end }}{{ end }}{{ if $several }}Assistant:{{ end }}AFTER"""
