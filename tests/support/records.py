"""Records as samples or refusals, and what a refusal says to type."""

import re
import shlex

from sft.data.columns import Columns
from sft.data.formats import Sample, to_sample
from sft.data.shards import Refused
from sft.training.arguments import DataArguments

BY_NAME = Columns()


def read(record: object, columns: Columns = BY_NAME) -> Sample:
    sample = to_sample(record, "行", columns)
    assert isinstance(sample, Sample), sample
    return sample


def refusal(record: object, columns: Columns = BY_NAME) -> str:
    refused = to_sample(record, "行", columns)
    assert isinstance(refused, Refused), refused
    assert "\n" not in refused.reason
    return refused.reason


def typed(advice: str) -> Columns:
    """Return the columns of flags as a shell would pass them."""
    words = shlex.split(advice)
    flags = dict(zip(words[::2], words[1::2], strict=True))
    return DataArguments("x", **{flag.removeprefix("--"): value for flag, value in flags.items()}).reads_by


def advised(reason: str) -> list[str]:
    """Return each way out that a refusal offers."""
    return re.split(r",? or |, for example ", reason.split("; type ")[-1])
