"""The conversations that a browser keeps: asked, answered, changed, exported, and checked when they come back."""

import json

import pytest

from sft.data.formats import read_samples
from sft.web import history
from sft.web.history import MAX_CHARACTERS, MAX_CONVERSATIONS, Store
from sft.web.texts import LANGUAGES, RefusedError


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


def test_unanswered_questions_are_kept_and_not_asked_again():
    store = talked(("一", ""), ("二", "2"))
    assert turns_of(store) == [("一", []), ("二", ["2"])]
    asked = history.messages(history.opened(history.ask(store, "三")), 0)
    assert [each["content"] for each in asked] == ["二", "2", "三"]


def test_second_checkpoint_is_told_its_own_answers():
    store = history.answer(history.ask(history.blank(), "一"), ["a", "b"])
    conversation = history.opened(history.ask(store, "二"))
    assert [history.messages(conversation, i)[1]["content"] for i in (0, 1)] == ["a", "b"]


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
    with pytest.raises(RefusedError, match="list_full"):
        history.ask(store, "y" * 11)
    many = history.blank()
    for number in range(MAX_CONVERSATIONS):
        many = history.ask(history.start_new(many), str(number))
    history.ask(many, "another turn")
    with pytest.raises(RefusedError, match="list_full"):
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


def test_language_of_a_store_is_any_of_the_pages_and_no_other(monkeypatch: pytest.MonkeyPatch):
    blank = history.blank()
    assert history.language_of(blank) == "en" and history.language_of({**blank, "language": "zh"}) == "zh"
    assert history.checked({**blank, "language": "fr"})["language"] is None
    monkeypatch.setitem(LANGUAGES, "fr", "Français")
    assert history.checked({**blank, "language": "fr"})["language"] == "fr"
