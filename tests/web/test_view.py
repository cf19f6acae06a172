"""How conversations, settings and requests look to Gradio and from it."""

import base64
import json

import pytest

from sft.web.history import Conversation
from sft.web.markdown import as_markdown
from sft.web.texts import RefusedError
from sft.web.view import as_history, as_messages, as_sampling, export_link, merged, turn_at


def conversation_of(*turns: tuple[str, list[str]]) -> Conversation:
    """Return a conversation of questions and the answers of each checkpoint."""
    return {
        "id": "a",
        "title": "t",
        "turns": [{"question": question, "answers": answers} for question, answers in turns],
    }


def test_unanswered_questions_are_shown():
    conversation = conversation_of(("一", []), ("二", ["2"]))
    assert [each["role"] for each in as_messages(conversation, 0)] == ["user", "user", "assistant"]
    assert [turn_at(conversation, index) for index in (0, 1, 2, 3, -1)] == [0, 1, 1, -1, -1]
    assert turn_at(conversation, [2, 0]) == 1 and turn_at(None, 0) == -1


def test_each_checkpoint_shows_its_own_answers():
    conversation = conversation_of(("一", ["a", "b"]))
    assert as_messages(conversation, 1)[1]["content"] == [{"type": "text", "text": as_markdown("b")}]
    assert as_messages(conversation, 2)[1]["content"] == [{"type": "text", "text": ""}]


def test_export_link_holds_the_file_and_no_html():
    conversation = {**conversation_of(("一", ["</a><script>"])), "title": '"><b>/../x'}
    link = export_link(conversation, "en")
    assert link.count("<") == 2 and link.startswith('<a download="b_x.json" href="data:application/json;base64,')
    content = base64.b64decode(link.split("base64,")[1].split('"')[0]).decode()
    assert json.loads(content)[0]["messages"][1]["content"] == "</a><script>"


def test_settings_become_a_sampling():
    numbers = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "seed": " 7 "}
    assert as_sampling(numbers).seed == 7 and as_sampling({**numbers, "seed": ""}).seed is None
    for seed in ("x", "-1", "1.5", "٣"):
        with pytest.raises(RefusedError):
            as_sampling({**numbers, "seed": seed})


@pytest.mark.parametrize("history", [5, "ab", [1], [{"role": "user"}], [{"role": "assistant", "content": "x"}]])
def test_history_of_an_api_call_that_is_none(history: object):
    with pytest.raises(RefusedError):
        as_history(history)
    with pytest.raises(RefusedError):
        as_history([{"role": "user", "content": "x"}])
    assert as_history(None) == as_history([]) == []


def test_merged_updates():
    assert merged({"a": {"value": 1}}, {"a": {"label": "x"}, "b": {}}) == {"a": {"value": 1, "label": "x"}, "b": {}}
