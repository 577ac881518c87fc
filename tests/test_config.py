"""Defaults, then a preset, then a YAML file, then flags; unknown names are refused with the nearest known one."""

import subprocess
import sys

import pytest
import yaml

from megalrps.config import parse_config
from megalrps.errors import InputError
from megalrps.model.presets import PRESETS

SHAPE = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]


def test_later_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: llama-tiny\nnum-layers: 3\nhidden_size: 96\nlr: 1e-3\n")
    config = parse_config(["--config", str(file), "--hidden-size", "160"])
    assert config.model.num_attention_heads == PRESETS["llama-tiny"].num_attention_heads
    assert config.model.num_layers == 3
    assert config.model.hidden_size == 160
    assert config.plan.lr == 1e-3
    assert config.plan.min_lr == 3e-5


def test_a_preset_on_the_command_line_replaces_the_files(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: llama-tiny\n")
    config = parse_config(["--config", str(file), "--preset", "llama-1.2b"])
    assert config.model == PRESETS["llama-1.2b"]


def test_sections_and_flat_keys_mean_the_same(tmp_path):
    flat, sectioned = tmp_path / "flat.yaml", tmp_path / "sectioned.yaml"
    flat.write_text("num-layers: 2\nhidden-size: 64\nnum-attention-heads: 4\nalpha: [0.5, 0.6]\nbf16: true\n")
    sectioned.write_text(
        "model: {num-layers: 2, hidden-size: 64, num-attention-heads: 4}\n"
        "plan: {alpha: [0.5, 0.6]}\ntraining: {bf16: true}\n"
    )
    read = [parse_config(["--config", str(file)]) for file in (flat, sectioned)]
    assert read[0].to_json() == read[1].to_json()
    assert read[0].plan.alpha == (0.5, 0.6) and read[0].training.bf16


def test_the_resolved_options_read_back_as_themselves(tmp_path):
    config = parse_config(
        ["--preset", "llama-tiny", "--increments", "a", "b", "--alpha", "0.25", "--clip-grad", "0.05", "--save", "here"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert parse_config(["--config", str(file)]).to_json() == config.to_json()


def test_yaml_rates_written_like_1e_minus_3_are_numbers(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: llama-tiny\nmin-lr: 1e-5\n")
    assert parse_config(["--config", str(file)]).plan.min_lr == 1e-5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("num-layer: 3", "did you mean num-layers"),
        ("model: {lr: 1}", "lr belongs to section plan, not model"),
        ("lr: 1\nplan: {lr: 2}", "given twice"),
        ("config: other.yaml", "cannot name another"),
        ("[1, 2]", "expected 'option: value' lines"),
        ("a: [", "is not YAML"),
        ("lr: {a: 1}", "takes no nested options"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, complaint):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        parse_config(["--config", str(file)])
    assert str(file) in str(caught.value)


def test_a_missing_file_and_an_unknown_preset_are_refused():
    with pytest.raises(InputError, match=r"nowhere\.yaml cannot be read"):
        parse_config(["--config", "nowhere.yaml"])
    with pytest.raises(InputError, match="did you mean llama-tiny"):
        parse_config(["--preset", "lama-tiny"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*SHAPE, "--num-layer", "3"], "--num-layers"),
        ([*SHAPE, "--lr", "fast"], "--lr"),
        (["--num-layers", "2"], "--hidden-size"),
    ],
)
def test_a_bad_command_line_exits_with_2_and_names_the_flag(arguments, named, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(arguments)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_help_names_every_option_with_its_default_and_needs_no_torch():
    code = (
        "import sys; from megalrps.config import parse_config\n"
        "try:\n    parse_config(['--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag in (
        "--num-layers",
        "--global-batch-size",
        "--lr-warmup-iters",
        "--alpha",
        "--increments",
        "--save-interval",
    ):
        assert flag in done.stdout
    assert "(default: 256)" in done.stdout


def test_config_yaml_is_plain_yaml():
    sections = yaml.safe_load(parse_config(SHAPE).to_yaml())
    assert sections["plan"]["alpha"] == [0.6]
    assert "num-layers" in sections["model"]
