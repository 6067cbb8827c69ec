"""Prompt templates."""

import pytest
from open_clip import OPENAI_IMAGENET_TEMPLATES

from pretrain.config import ConfigError
from pretrain.evaluation.prompts import fill, imagenet_templates, read_templates


def test_the_eighty_templates_fill_as_open_clips_functions_do():
    prompts = fill(imagenet_templates(), "great white shark")
    assert len(prompts) == 80 and prompts == [template("great white shark") for template in OPENAI_IMAGENET_TEMPLATES]


def test_braces_in_a_name_or_around_other_words_stay():
    assert fill(["{x} {}", "{} and {}"], "a {} b") == ["{x} a {} b", "a {} b and a {} b"]


def test_a_file_has_a_template_a_line(tmp_path):
    (tmp_path / "t.txt").write_text("a {}.\n\n  my {}  \n")
    assert read_templates(tmp_path / "t.txt") == ["a {}.", "my {}"]


@pytest.mark.parametrize(("text", "message"), [(None, "no file of prompt"), ("\n", "is empty"), ("a\n", "has no {}")])
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message):
    path = tmp_path / "t.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_templates(path)
    assert str(path) in str(caught.value)
