"""The configuration: YAML, parents, overrides, and the sentences for what is wrong with them."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pretrain.config import ConfigError, PretrainConfig, config_from_dict, load_config, schema_fields, to_yaml

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "c.yaml", "phases:\n- {name: a, steps: 5}\n- {name: b, steps: 6}\nrun: {seed: 3}\n")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_configurations_load_and_open_with_their_command(path):
    config = load_config(path)
    assert isinstance(config, PretrainConfig) and config.run.output.startswith("runs/")
    assert f"tools/pretrain.py --config configs/pretrain/{path.name}" in path.read_text()


def test_there_are_published_configurations():
    assert PUBLISHED


def test_defaults_are_valid(tmp_path):
    assert load_config(write(tmp_path / "empty.yaml", "")) == PretrainConfig()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_yaml_round_trip_gives_an_equal_configuration(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path / "again.yaml", to_yaml(config))) == config


def test_written_yaml_is_complete():
    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]

    assert sorted(leaves(yaml.safe_load(to_yaml(PretrainConfig())))) == sorted(schema_fields())


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"objektive": "x"}, "unknown field 'objektive': did you mean 'objective'?"),
        ({"run": {"sed": 1}}, "unknown field 'run.sed': did you mean 'seed'?"),
        ({"data": {"caption": {"template": []}}}, "unknown field 'data.caption.template': did you mean 'templates'?"),
        ({"phases": [{}, {"step": 3}]}, "unknown field 'phases[1].step': did you mean 'steps'?"),
        ({"qqq": 1}, "unknown field 'qqq': known fields: model, data, objective, phases"),
    ],
)
def test_an_unknown_field_names_the_nearest(node, message):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(node)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("node", "where"),
    [
        ({"run": {"seed": "many"}}, "run.seed"),
        ({"phases": [{"lr": "fast"}]}, "phases[0].lr"),
        ({"phases": {"steps": 3}}, "phases"),
        ({"model": 3}, "model"),
        ({"data": {"preload": 7.5}}, "data.preload"),
        ({"evaluation": {"splits": "val"}}, "evaluation.splits is 'val': it must be a list"),
        ({"objective": {"options": ["terms"]}}, "objective.options is ['terms']: it must be a mapping"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_field(node, where):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(node)
    assert str(caught.value).startswith(where) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"phases": []}, "phases: at least one is needed"),
        ({"phases": [{"steps": 0}]}, r"phases\[0\].steps is 0: it must be at least 1"),
        ({"phases": [{}, {"batch_size": -1}]}, r"phases\[1\].batch_size is -1"),
        ({"phases": [{"warmup_steps": -1}]}, r"phases\[0\].warmup_steps is -1: it must not be negative"),
        ({"phases": [{"schedule": "step"}]}, "schedule is 'step': linear or cosine"),
        ({"phases": [{"context_length": 65}]}, r"context_length 65 exceeds model.text.context_length 64"),
        ({"run": {"device": "gpu"}}, "run.device is 'gpu': auto, cpu, cuda or xla"),
        ({"run": {"precision": "fp8"}}, "run.precision is 'fp8'"),
        ({"run": {"checkpoint_every": 0}}, "run.checkpoint_every is 0"),
        ({"run": {"log_every": 0}}, "run.log_every is 0"),
        ({"data": {"caption": {"templates": []}}}, "at least one template"),
        ({"data": {"workers": -1}}, "data.workers is -1: it must be at least 0, or null"),
        (
            {"data": {"augmentation": {"crop_short_side": 48}}},
            r"data.augmentation.crop_short_side is 48: it must be 0, or at least phases\[0\].image_size 64",
        ),
        ({"phases": [{"augmentation": {"crop_short_side": -1}}]}, r"phases\[0\].augmentation.crop_short_side is -1"),
    ],
)
def test_an_impossible_value_is_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(node)


@pytest.mark.parametrize("group", ["objective", "optim"])
def test_a_parents_options_go_with_the_name_they_are_of(tmp_path, group):
    parent = "objective: {name: otter, options: {epsilon: 0.1}}\noptim: {name: muon, options: {epsilon: 0.1}}\n"
    write(tmp_path / "parent.yaml", parent + "model: {embed_dim: 64}\n")
    same = load_config(write(tmp_path / "same.yaml", f"parent: parent.yaml\n{group}: {{options: {{alpha: 0.5}}}}\n"))
    assert getattr(same, group).options == {"epsilon": 0.1, "alpha": 0.5}
    other = load_config(write(tmp_path / "other.yaml", f"parent: parent.yaml\n{group}: {{name: adamw}}\n"))
    assert (getattr(other, group).name, getattr(other, group).options) == ("adamw", {})
    assert other.model.embed_dim == 64


def test_a_parent_is_merged_and_its_lists_are_replaced(tmp_path, file):
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub" / "d.yaml", "parent: ../c.yaml\nphases: [{name: only}]\nrun: {output: there}\n")
    config = load_config(child)
    assert [p.name for p in config.phases] == ["only"] and (config.run.seed, config.run.output) == (3, "there")
    grandchild = load_config(write(tmp_path / "e.yaml", "parent: sub/d.yaml\nrun: {seed: 9}\n"))
    assert (grandchild.run.seed, grandchild.run.output) == (9, "there")


def test_overrides_reach_nested_fields_and_list_items(file):
    overrides = [
        "phases.0.steps=7",
        "phases[1].lr=0.5",
        "run.output=a=b",
        "data.withhold=null",
        "optim.betas=[0.9,0.95]",
    ]
    config = load_config(file, overrides)
    assert (config.phases[0].steps, config.phases[0].name, config.phases[1].steps) == (7, "a", 6)
    assert config.phases[1].lr == 0.5 and config.run.output == "a=b" and config.run.seed == 3
    assert config.data.withhold is None and config.optim.betas == [0.9, 0.95]


def test_an_index_counts_in_the_default_phases_when_the_file_has_none(tmp_path):
    config = load_config(write(tmp_path / "c.yaml", "objective: {name: info_nce}\n"), ["phases.0.steps=3"])
    assert config.phases == [replace(PretrainConfig().phases[0], steps=3)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases", "override 'phases' is not of the form key=value"),
        ("phases.5.steps=1", r"phases is a list and counts from 0 \(phases\[0\] is a, .* is b\): phases\[0\].steps=…"),
        ("phases.batch_size=64", r"override 'phases.batch_size=64': phases is a list .*: phases\[0\].batch_size=…"),
        ("phases.b.objective.name=otter", r"phases is a list .*: phases\[1\].objective.name=…"),
        ("run.output=[", "override 'run.output=\\['"),
        ("run.sed=1", "unknown field 'run.sed': did you mean 'seed'"),
        ("run.seed=x", "run.seed"),
    ],
)
def test_a_bad_override_is_one_sentence(file, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path, file):
    with pytest.raises(ConfigError, match=f"no configuration file {tmp_path}/cc.yaml; did you mean {file}"):
        load_config(tmp_path / "cc.yaml")


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "- 1\n- 2\n", "run: {output: '${nowhere}'}\n"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match="bad.yaml") as caught:
        load_config(write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parent", "child", "expected"),
    [
        ("{name: otter, options: {alpha: 0.3}}", "{name: info_nce}", ("info_nce", {})),
        ("{name: otter, options: {alpha: 0.3}}", "{name: otter}", ("otter", {"alpha": 0.3})),
        ("{name: otter, options: {alpha: 1}}", "{options: {epsilon: 0.2}}", ("otter", {"alpha": 1, "epsilon": 0.2})),
        ("{options: {chunk_size: 4}}", "{name: info_nce}", ("info_nce", {"chunk_size": 4})),  # the name was so
        ("otter", "{name: otter}", ("otter", {})),
        ("null", "{name: otter}", ("otter", {})),
    ],
)  # fmt: skip
def test_options_go_with_the_name_they_are_of(tmp_path, parent, child, expected):
    write(tmp_path / "p.yaml", f"objective: {parent}\n")
    config = load_config(write(tmp_path / "c.yaml", f"parent: p.yaml\nobjective: {child}\n"))
    assert (config.objective.name, config.objective.options) == expected


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        ("[1]", "{name: otter}", "c.yaml does not fit its parent p.yaml"),
        ("{name: otter}", "[a]", "c.yaml does not fit its parent p.yaml"),
        ("{name: otter}", '{name: "${foo}"}', "c.yaml: Interpolation key 'foo' not found"),
        ("{name: otter}", "otter", "objective"),
    ],
)
def test_a_malformed_objective_beside_a_parents_is_one_sentence(tmp_path, parent, child, message):
    write(tmp_path / "p.yaml", f"objective: {parent}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "c.yaml", f"parent: p.yaml\nobjective: {child}\n"))


def test_an_override_of_the_name_leaves_the_options_of_the_other_behind(tmp_path):
    path = write(
        tmp_path / "c.yaml", "objective: {name: otter, options: {alpha: 0.3}}\noptim: {options: {eps: 1e-6}}\n"
    )
    assert load_config(path, ["objective.name=info_nce"]).objective.options == {}
    assert load_config(path, ["objective.name=otter"]).objective.options == {"alpha": 0.3}
    config = load_config(path, ["objective.options.alpha=0.7", "objective.name=distillation", "optim.name=lamb"])
    assert config.objective.options == {"alpha": 0.7} and config.optim.options == {}
