"""A conversation and the room of its answer, fitted into the context that a model was trained with."""

from collections.abc import Sequence
from dataclasses import replace

from sft.chat.sampling import Sampling
from sft.data.encode import Encoder
from sft.data.formats import Sample
from sft.prompts import split_system


def fit(
    encoder: Encoder, messages: Sequence[dict[str, str]], sampling: Sampling
) -> tuple[list[int], Sampling, int, int]:
    """Return the prompt's ids and the sampling with what room is left, and how many turns and tokens were left out.

    If the conversation and the longest answer do not fit together, the oldest turns are left out, and then the
    beginning of the question, as in training. Raises ValueError if the roles do not alternate.
    """
    system, turns = split_system(messages)
    contents = [turn["content"] for turn in turns]
    history = [*zip(contents[:-1:2], contents[1::2], strict=True)]
    sample = Sample(contents[-1], "", "", "", history, system)
    # An answer may take at most half of the context, so that some of the question is always read.
    room = min(sampling.max_new_tokens, encoder.max_length // 2)
    prompt, turns_left_out, tokens_left_out = encoder.encode_prompt(sample, room)
    longest = max(1, min(sampling.max_new_tokens, encoder.max_length - len(prompt)))
    return prompt, replace(sampling, max_new_tokens=longest), turns_left_out, tokens_left_out
