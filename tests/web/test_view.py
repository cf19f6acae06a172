"""What the chat page keeps, says and shows: conversations.py, page_text.py and page_parts.py."""

import base64
import json
import string

import pytest

from sft.data.formats import read_samples
from sft.web import history
from sft.web.history import MAX_CHARACTERS, MAX_CONVERSATIONS, ListFullError, Store
from sft.web.texts import EXAMPLES, TEXTS, language_of, say
from sft.web.view import as_history, as_messages, as_sampling, escape, export_link, merged, turn_at
from sft.web.visitors import RefusedError


def talked(*turns: tuple[str, str]) -> Store:
    """Return a store with one conversation of questions and answers; an empty answer is none."""
    store = history.blank()
    for question, answer in turns:
        store = history.answer(history.ask(store, question), [answer])
    return store


def turns_of(store: Store) -> list[tuple[str, list[str]]]:
    return [(turn["question"], turn["answers"]) for turn in history.opened(store)["turns"]]


def test_questions_and_answers_in_their_order():
    store = talked(("一", "1"), ("二", "2"))
    assert turns_of(store) == [("一", ["1"]), ("二", ["2"])]
    assert history.opened(store)["title"] == "一"
    told = history.messages(history.opened(history.ask(store, "三")), 0)
    assert [(each["role"], each["content"]) for each in told] == [
        *(("user", "一"), ("assistant", "1"), ("user", "二"), ("assistant", "2"), ("user", "三"))
    ]


def test_nothing_changes_the_store_that_is_given():
    store = talked(("一", "1"))
    before = json.dumps(store)
    history.ask(store, "二")
    history.answer(store, ["x"])
    history.take_back(store, 0)
    history.rename(store, "y")
    history.delete(store)
    history.start_new(store)
    assert json.dumps(store) == before


def test_question_in_the_place_of_a_turn_drops_what_followed():
    store = history.ask(talked(("一", "1"), ("二", "2"), ("三", "3")), "二之二", 1)
    assert turns_of(store) == [("一", ["1"]), ("二之二", [])]


def test_unanswered_questions_are_shown_and_not_told():
    store = talked(("一", ""), ("二", "2"))
    conversation = history.opened(store)
    assert turns_of(store) == [("一", []), ("二", ["2"])]
    assert [each["role"] for each in as_messages(conversation, 0)] == ["user", "user", "assistant"]
    assert [turn_at(conversation, index) for index in (0, 1, 2, 3, -1)] == [0, 1, 1, -1, -1]
    assert turn_at(conversation, [2, 0]) == 1 and turn_at(None, 0) == -1
    told = history.messages(history.opened(history.ask(store, "三")), 0)
    assert [each["content"] for each in told] == ["二", "2", "三"]


def test_second_checkpoint_is_told_its_own_answers():
    store = history.answer(history.ask(history.blank(), "一"), ["a", "b"])
    conversation = history.opened(history.ask(store, "二"))
    assert [history.messages(conversation, i)[1]["content"] for i in (0, 1)] == ["a", "b"]
    assert as_messages(conversation, 1)[1]["content"] == [{"type": "text", "text": "b"}]
    assert as_messages(conversation, 2)[1]["content"] == [{"type": "text", "text": ""}]


def test_list_of_conversations():
    store = history.ask(history.start_new(talked(("一", "1"))), "二")
    assert [each["title"] for each in store["conversations"]] == ["二", "一"]
    first, second = (each["id"] for each in store["conversations"])
    assert store["open"] == first
    store = history.rename(history.open_one(store, second), "  新 的\n名字 ")
    assert history.opened(store)["title"] == "新 的 名字"
    assert history.opened(history.rename(store, " "))["title"] == "新 的 名字"
    assert [each["id"] for each in history.delete(store)["conversations"]] == [first]
    assert history.open_one(store, "none")["open"] is None


def test_question_taken_back():
    store, question = history.take_back(talked(("一", "1"), ("二", "2")), 1)
    assert question == "二" and turns_of(store) == [("一", ["1"])]
    assert history.take_back(store, 5)[1] == history.take_back(history.blank(), 0)[1] == ""


def test_full_list_is_told():
    store = talked(("一", "x" * (MAX_CHARACTERS - 10)))
    with pytest.raises(ListFullError):
        history.ask(store, "y" * 11)
    many = history.blank()
    for number in range(MAX_CONVERSATIONS):
        many = history.ask(history.start_new(many), str(number))
    history.ask(many, "another turn")
    with pytest.raises(ListFullError):
        history.ask(history.start_new(many), "another conversation")


@pytest.mark.parametrize(
    "store",
    [
        *(None, [], "x", 5, {}, {"conversations": 3}, {"conversations": [None]}, {"conversations": [{"id": "a"}]}),
        {"open": None, "conversations": [{"id": "a", "title": "t", "turns": [{"question": 1, "answers": []}]}]},
        {"open": None, "conversations": [{"id": "a", "title": "t", "turns": [{"question": "q", "answers": [{}]}]}]},
        {"open": None, "conversations": [{"id": "a", "title": "t", "turns": []}] * 2},
    ],
)
def test_store_that_is_none_is_blank(store: object):
    assert history.checked(store) == history.blank()


def test_store_of_a_browser_is_taken_as_it_is():
    store = {**talked(("一", "1")), "language": "zh"}
    assert history.checked(json.loads(json.dumps(store))) == store
    strange = {**talked(("a\ud800b", "\ud83d\ude00")), "open": "other", "language": "xx"}
    checked = history.checked(strange)
    assert (checked["open"], checked["language"]) == (None, None)
    assert checked["conversations"][0]["turns"] == [{"question": "a\ufffdb", "answers": ["😀"]}]


def test_export_is_a_row_of_training_data(tmp_path):
    store = talked(("一", "1"), ("没有回答", ""), ("二", "2\n"))
    file = tmp_path / "rows.json"
    file.write_text(history.export(history.opened(store)), encoding="utf-8")
    [row] = read_samples(file)
    assert [*map(tuple, row.history), (row.instruction, row.output)] == [("一", "1"), ("二", "2\n")]
    assert json.loads(history.export(history.opened(talked(("一", ""))))) == []


def test_export_link_holds_the_file_and_no_html():
    store = history.rename(talked(("一", "</a><script>")), '"><b>/../x')
    link = export_link(history.opened(store), "en")
    assert link.count("<") == 2 and link.startswith('<a download="b_x.json" href="data:application/json;base64,')
    content = base64.b64decode(link.split("base64,")[1].split('"')[0]).decode()
    assert json.loads(content)[0]["messages"][1]["content"] == "</a><script>"


def test_both_languages_say_the_same_with_the_same_values():
    assert set(TEXTS["en"]) == set(TEXTS["zh"])
    for key in TEXTS["en"]:
        fields = [{field for _, field, _, _ in string.Formatter().parse(TEXTS[language][key])} for language in TEXTS]
        assert fields[0] == fields[1], key
    assert len(EXAMPLES["en"]) == len(EXAMPLES["zh"])


@pytest.mark.parametrize(
    ("header", "language"),
    [
        *(("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,en;q=0.9,zh;q=0.8", "en"), ("fr,zh-TW;q=0.5", "zh")),
        *(("", "en"), ("de", "en"), ("*", "en"), (";;,,", "en")),
    ],
)
def test_language_of_a_browser(header: str, language: str):
    assert language_of(header) == language


def test_say():
    assert say("zh", "waiting", ahead=3) == "前面还有 3 个问题"
    assert say("en", "long_question", given=12345, most=8000).startswith("The question has 12,345 characters; at most")


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


def test_escaped_names_and_merged_updates():
    assert escape("a_b*<c>[d](e)") == r"a\_b\*\<c\>\[d\]\(e\)"
    assert merged({"a": {"value": 1}}, {"a": {"label": "x"}, "b": {}}) == {"a": {"value": 1, "label": "x"}, "b": {}}
