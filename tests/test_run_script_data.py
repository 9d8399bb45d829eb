"""The data variables of run.sh."""

from __future__ import annotations

from pathlib import Path

from helpers.scripts import config_of, launch_command, run_script
from megatron.config.schema import DataConfig, RunConfig

RUN = Path(__file__).resolve().parents[1] / "examples_deepspeed/MoE/run.sh"


def parsed(folder: Path, **env: str) -> RunConfig:
    """Return the configuration of the command that run.sh would start in a folder."""
    done = run_script(RUN, cwd=folder, DRY_RUN="1", PYTHON="/bin/echo", **env)
    assert done.returncode == 0, done.stderr
    return config_of(launch_command(done.stdout))


def test_streaming_patterns_are_not_expanded(tmp_path):
    """Patterns reach the program as they are."""
    (tmp_path / "a.jsonl").touch()
    data = parsed(tmp_path, STREAMING_DATA_PATH="0.3 *.jsonl 0.7 b", VALID_DATA_PATH="v w").data
    assert data.streaming_data_path == ("0.3", "*.jsonl", "0.7", "b") and data.data_path == ()
    assert data.valid_data_path == ("v", "w") and data.test_data_path == ()
    data = parsed(tmp_path, STREAMING_DATA_PATH="b").data
    assert data.streaming_data_path == ("b",) and data.valid_data_path == ()


def test_data_variables_arrive(tmp_path):
    env = {
        "DATA_ARGS_PATH": "blend.txt",
        "SPLIT": "95,5,0",
        "VALID_DATA_PATH": "v",
        "TEST_DATA_PATH": "0.5 t 0.5 u",
        "VALID_SETS": "wiki=w code=1 c 2 d*",
    }
    (tmp_path / "d1").touch()
    data = parsed(tmp_path, **env).data
    assert (data.data_args_path, data.data_path, data.split) == ("blend.txt", (), "95,5,0")
    assert (data.valid_data_path, data.test_data_path) == (("v",), ("0.5", "t", "0.5", "u"))
    assert data.named_valid_sets == {"wiki": ("w",), "code": ("1", "c", "2", "d*")}


def test_data_variables_default_to_the_flags(tmp_path):
    data = parsed(tmp_path).data
    assert data == DataConfig(data_path=("dataset/corpus_text_document",))


def test_mock_data_variable_needs_no_files(tmp_path):
    config = parsed(tmp_path, MOCK_DATA="true", VOCAB_SIZE="1000")
    assert config.data == DataConfig(mock_data=True)
    assert config.model.vocab_size == 1000 and config.tokenizer.lacks_files
