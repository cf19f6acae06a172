"""The page says the same in all its languages, and picks the browser's."""

import string

import pytest

from sft.web.texts import DEFAULT_LANGUAGE, EXAMPLES, LANGUAGES, TEXTS, RefusedError, language_of, say


def test_all_languages_say_the_same_with_the_same_values():
    assert set(TEXTS) == set(EXAMPLES) == set(LANGUAGES) and DEFAULT_LANGUAGE in LANGUAGES
    for language in LANGUAGES:
        assert set(TEXTS[language]) == set(TEXTS[DEFAULT_LANGUAGE])
        for key, text in TEXTS[language].items():
            assert fields_of(text) == fields_of(TEXTS[DEFAULT_LANGUAGE][key]), (language, key)


def fields_of(text: str) -> set[str | None]:
    return {field for _, field, _, _ in string.Formatter().parse(text)}


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
    assert say("zh", "waiting", ahead=3) == "前面还有 3 个问题在排队"
    assert say("en", "long_question", given=12345, most=8000).startswith(
        "The question has 12,345 characters; the limit is"
    )


def test_refusal_is_a_sentence_in_the_language_asked_for():
    refused = RefusedError("too_many", seconds=7)
    assert refused.sentence("en") == "You have reached this minute's limit. Please try again in 7 seconds."
    assert "7 秒" in refused.sentence("zh")
