"""Names of special tokens in a text are plain text: no id of theirs, and the text comes back."""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft.data import cache, encode
from sft.data.encode import Encoder, cuts_at_the_template, plain_backend, special_tokens
from sft.data.formats import Sample
from sft.data.load import load_examples
from sft.model.load import load_tokenizer
from sft.prompts import build_chat_prompt, build_prompt
from sft.tools.random_model import BLOOM_SPECIAL_TOKENS, FALCON_SPECIAL_TOKENS, train_tokenizer

NAMES = [*BLOOM_SPECIAL_TOKENS, *FALCON_SPECIAL_TOKENS]
PIECES = [
    *NAMES,
    "<",
    "/",
    "s>",
    "</s",
    "|>",
    ">>",
    " ",
    "\n",
    "\n\n",
    "好",
    "。",
    "é",
    "😀",
    "a",
    "1",
    "### Response:",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


@pytest.fixture(params=["bloom-tiny with fastokens", "bloom-tiny", "falcon-tiny"])
def encoder(request: pytest.FixtureRequest, make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    """Return an encoder of either family, with and without fastokens, which does not support Falcon's."""
    shape, *way = request.param.split(" ", 1)
    if not way:
        monkeypatch.setattr(encode, "fastokens", None)
    encoder = Encoder(load_tokenizer(str(make_model(shape))))
    assert (encoder.faster is not None) == bool(way)
    return encoder


def check_plain(encoder: Encoder, sample: Sample) -> None:
    """Assert that a sample is plain text but for the eos of each reply."""
    tokenizer, special = encoder.tokenizer, set(special_tokens(encoder.tokenizer).values())
    [examples] = encoder.encode([sample])
    replies = [*(reply for _, reply in sample.history), sample.output]
    for example, reply in zip(examples, replies, strict=True):
        *answer, last = example.answer
        assert last == tokenizer.eos_token_id
        assert not special & {*example.prompt, *answer}
        assert tokenizer.decode(answer, skip_special_tokens=True) == reply
        assert tokenizer.decode(answer) == reply
    prompt, turns_left_out, tokens_left_out = encoder.encode_prompt(sample, 1)
    assert (prompt, turns_left_out, tokens_left_out) == (examples[-1].prompt, 0, 0)
    messages = []
    for question, reply in sample.history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    messages.append({"role": "user", "content": sample.instruction})
    text = build_prompt(sample.instruction, sample.input) if sample.input else build_chat_prompt(messages)
    assert tokenizer.decode(prompt, skip_special_tokens=True) == text
    assert prompt == encoder.encode_text(text) == tokenizer(text, split_special_tokens=True).input_ids


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_special_token_is_plain_text_wherever_it_stands(encoder: Encoder, name: str):
    check_plain(
        encoder, Sample(f"{name}什么是{name}？{name}", f"{name}\n{name}{name}", f"{name}是 {name}。{name}", "rows:1")
    )
    check_plain(encoder, Sample(name, "", name, "rows:1", [(name, f"a{name}b"), (f"\n{name}", f"{name}\n")]))


def test_so_is_any_text_around_it(encoder: Encoder):
    quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

    @quick
    @given(TEXTS, TEXTS, TEXTS)
    def check(instruction: str, input: str, output: str) -> None:
        check_plain(encoder, Sample(instruction, input, output, "rows:1"))
        check_plain(encoder, Sample(instruction, "", output, "rows:1", [(input, output)]))

    check()


def test_a_call_of_the_tokenizer_changes_nothing(encoder: Encoder):
    eos = encoder.tokenizer.eos_token
    before = encoder.encode_text(eos)
    assert encoder.tokenizer(eos).input_ids == [encoder.eos]
    assert encoder.encode_text(eos) == before
    assert encoder.tokenizer(eos).input_ids == [encoder.eos]


def test_a_prompt_that_is_cut_is_plain_text_too(encoder: Encoder):
    eos = encoder.tokenizer.eos_token
    encoder.max_length = 150
    [[example]] = encoder.encode([Sample(f"{eos}问" * 99, eos, f"{eos}答" * 40, "rows:1")])
    assert example.note and encoder.eos not in example.prompt + example.answer[:-1]
    assert encoder.tokenizer.decode(example.prompt).endswith("### Response:")


def test_rows_of_a_file_hold_eos_at_their_end_only(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    row = {"instruction": "".join(NAMES), "input": "", "output": f"。{tokenizer.eos_token}。"}
    (tmp_path / "rows.json").write_text(json.dumps(row), encoding="utf-8")
    examples, _ = load_examples(str(tmp_path / "rows.json"), tokenizer, str(tmp_path))
    [ids] = examples["input_ids"]
    assert set(special_tokens(tokenizer).values()) & {*ids} == {tokenizer.eos_token_id}
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


# ------------------------------------------------------------------------------------------------- other vocabularies


@pytest.mark.parametrize("uses_fastokens", [True, False])
def test_merges_that_make_a_special_token_are_not_used_for_text(uses_fastokens: bool, monkeypatch: pytest.MonkeyPatch):
    tokenizer = train_tokenizer("bloom", ["你好"] * 9, 1024)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {"</": len(tokenizer), "</s": len(tokenizer) + 1}
    state["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert 2 in tokenizer("。</s>。", split_special_tokens=True).input_ids
    if not uses_fastokens:
        monkeypatch.setattr(encode, "fastokens", None)
    encoder = Encoder(tokenizer)
    assert (encoder.faster is not None) == uses_fastokens
    for text in ("</s>", "。</s>。", "</s></s>", "a</s>b", " </s> "):
        [[example]] = encoder.encode([Sample(text, "", text, "rows:1")])
        assert not {0, 1, 2, 3} & {*example.prompt, *example.answer[:-1]}
        assert tokenizer.decode(example.answer[:-1]) == text
        assert tokenizer.decode(example.prompt) == build_prompt(text)


def test_pieces_that_are_a_special_token_are_not_used_for_text(tokenizer: PreTrainedTokenizerBase):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    scores = [[piece, 0.0 if piece in NAMES else -float(len(pieces))] for piece in pieces]
    state["model"] = {"type": "Unigram", "vocab": scores, "unk_id": 0, "byte_fallback": False}
    state["pre_tokenizer"] = None  # ASCII is the same in the byte-level alphabet
    plain = plain_backend(type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>"))
    special = set(special_tokens(tokenizer).values())
    names = list(special_tokens(tokenizer))
    assert all({token.id for token in plain.model.tokenize(name)} <= special for name in names)
    for text in ("".join(names), *(f"a{name}b" for name in names)):
        assert not special & {*plain.encode(text, add_special_tokens=False).ids}


@pytest.mark.parametrize("how", ["whole prompts", "text is rewritten", "begins with bos"])
def test_whole_prompts_are_plain_text(how: str, make_model: Callable[[str], Path]):
    tokenizer = load_tokenizer(str(make_model("bloom-tiny")))
    backend = tokenizer.backend_tokenizer
    if how == "whole prompts":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif how == "text is rewritten":
        backend.normalizer = normalizers.Strip()
    else:
        tokenizer.add_bos_token = True
    assert not cuts_at_the_template(tokenizer)
    [[example]] = Encoder(tokenizer).encode([Sample("<s></s>", "<pad>", "</s>", "rows:1")])
    assert example.prompt == tokenizer(build_prompt("<s></s>", "<pad>"), split_special_tokens=True).input_ids
    begins = [tokenizer.bos_token_id] * (how == "begins with bos")
    assert [id for id in example.prompt if id in (0, 1, 2, 3)] == begins
    assert tokenizer.decode(example.prompt, skip_special_tokens=True) == build_prompt("<s></s>", "<pad>")


@pytest.mark.parametrize("name", ["天地", "\n\n", "</s", "\n\n###", ":\n"])
def test_added_tokens_that_are_not_special_are_found_as_the_tokenizer_finds_them(encoder: Encoder, name: str):
    tokenizer = type(encoder.tokenizer)(tokenizer_object=encoder.tokenizer.backend_tokenizer, eos_token="</s>")
    tokenizer.add_tokens([AddedToken(name, special=False)])
    tokenizer.model_max_length = 2048
    own = Encoder(tokenizer)
    id = tokenizer.convert_tokens_to_ids(name)
    for text in (name, f"a{name}b", f"{name}{name}</s>", f"{name}\n"):
        for input in ("", text):
            [[example]] = own.encode([Sample(text, input, text, "rows:1")])
            expected = tokenizer(build_prompt(text, input), split_special_tokens=True).input_ids
            assert example.prompt == own.encode_text(build_prompt(text, input)) == expected
            assert id in example.answer
            assert tokenizer.decode(example.answer[:-1]) == text


# ------------------------------------------------------------------------------------------------------ what others get


HAS_SANITIZE = "sanitize_control_tokens" in signature(PreTrainedTokenizerBase.apply_chat_template).parameters


def test_a_saved_tokenizer_is_a_plain_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    Encoder(tokenizer).encode([Sample("</s>", "", "<|endoftext|>", "rows:1")])
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("split_special_tokens") in (None, False)
    saved, eos = AutoTokenizer.from_pretrained(tmp_path), tokenizer.eos_token
    messages = [{"role": "user", "content": f"什么是{eos}？"}, {"role": "assistant", "content": f"{eos}是词元。"}]
    # Every name is the token, the template's and a user's alike, unless a program asks otherwise.
    ids = saved.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 3 and ids[-1] == tokenizer.eos_token_id
    if not HAS_SANITIZE:
        return
    ids = saved.apply_chat_template(messages, return_dict=True, sanitize_control_tokens=True)["input_ids"]
    [[example]] = Encoder(tokenizer).encode([Sample(messages[0]["content"], "", messages[1]["content"], "rows:1")])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[: len(example.prompt)] == example.prompt
    assert tokenizer.decode(ids) == tokenizer.decode(example.prompt + example.answer)


def test_rows_with_such_names_are_counted_once_each_wherever_the_name_stands(encoder: Encoder):
    [name, *_] = special_tokens(encoder.tokenizer)
    clean = Sample(name[:-1], name[-1], "好", "rows:1", (("早", "安"),))  # the name only across two texts
    rows = [
        Sample(*texts, "rows:1") for texts in ((name, name, name), ("问", f"甲{name}", "答"), ("问", "", f"{name}乙"))
    ]
    rows += [
        Sample("问", "", "答", "rows:1", (("早", "安"), (name, "好"))),
        Sample("问", "", "答", "rows:1", (), f"{name}\n"),
    ]
    rows += [Sample("问", "", "答", "rows:1", ((None, name),))]
    assert cache.remarks_of([clean] * 3, {cache.SPECIAL: encoder.special}) == {}
    assert cache.remarks_of([clean, *rows, clean], {cache.SPECIAL: encoder.special}) == {cache.SPECIAL: len(rows)}
    for row in rows:
        assert cache.remarks_of([clean, row], {cache.SPECIAL: encoder.special}) == {cache.SPECIAL: 1}
    assert cache.remarks_of(rows, {}) == {}
    assert cache.remarks_of([Sample("问\n二", "", "答", "rows:1"), clean], {cache.SPECIAL: ["\n"]}) == {
        cache.SPECIAL: 1
    }
