"""What a fine-tuned folder says of its losses and of who may use it."""

import pytest

from sft.training.model_card import base_licence, result_lines


def test_a_folders_own_card_says_its_licence(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: bigscience-bloom-rail-1.0\n---\n# BLOOM\n")
    metadata, sentence = base_licence(str(tmp_path), "falcon")
    assert metadata == "license: bigscience-bloom-rail-1.0\n"
    assert "`bigscience-bloom-rail-1.0`, as its own card says" in sentence


@pytest.mark.parametrize("text", [None, "no card\n", "---\nlanguage: zh\n---\n", "---\n: [\n---\n", "---\n- a\n---\n"])
def test_without_one_the_family_does(text, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    metadata, sentence = base_licence(str(tmp_path), "bloom")
    assert metadata == "" and "RAIL" in sentence
    assert "Apache-2.0" in base_licence(str(tmp_path), "falcon")[1]


def test_a_base_on_the_hub_is_linked_and_a_folder_is_not(tmp_path):
    assert base_licence("bigscience/bloom-560m", "bloom")[0] == "base_model: bigscience/bloom-560m\n"
    assert base_licence(str(tmp_path), "bloom")[0] == ""


def test_losses_before_and_after_are_those_that_were_logged():
    history = [{"step": 0, "eval_loss": 3.5}, {"step": 1, "loss": 3.25}, {"step": 9, "loss": 2.0}]
    lines = result_lines([*history, {"step": 1200, "eval_loss": 1.75}])
    assert lines == [
        "- training loss: 3.2500 at step 1, 2.0000 at step 9",
        "- held-out loss: 3.5000 before the first step, 1.7500 at step 1,200",
    ]
    assert result_lines([]) == ["- nothing was logged"]
