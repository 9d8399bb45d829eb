"""run.sh with stand-ins for nvidia-smi, the launcher and Python."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.scripts import config_of, run_script, stand_in

REPO = Path(__file__).resolve().parents[1]
RUN = REPO / "examples_deepspeed/MoE/run.sh"
FOUR_GPUS = "\n".join(f"GPU {i}: Some GPU (UUID: GPU-{i}abc-{i})" for i in range(4))
SPLIT_GPU = f"{FOUR_GPUS.splitlines()[0]}\n  MIG 1g.5gb Device 0: (UUID: MIG-1)"
NODE_1 = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "NUM_NODES": "2"}
HOSTS = "a slots=2\nb slots=2\n"
LAUNCHERS = ("SLURM_", "OMPI_", "PMI_")


@pytest.fixture(autouse=True)
def no_devices(monkeypatch):
    """Tests set these variables, which the machine may set as well."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS) or name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
            monkeypatch.delenv(name)


def run(folder: Path, *, gpus: str = "", **env: str) -> subprocess.CompletedProcess:
    """Run run.sh on a machine with these GPUs, whose launcher prints what it is given.

    Args:
        gpus: what nvidia-smi prints; empty: it does not exist.
    """
    stand_in(folder, "nvidia-smi", f"cat <<'EOF'\n{gpus}\nEOF" if gpus else "exit 127")
    if not (folder / "bin/deepspeed").exists():
        shown = "${DS_ACCELERATOR-} ${CUDA_VISIBLE_DEVICES-unset}"
        stand_in(folder, "deepspeed", f'printf \'%s\\n\' "$@" "{shown}"')
    stand_in(folder, "python", "exit 0")
    path = f"{folder}/bin:{os.environ['PATH']}"
    fixed = {"PYTHON": f"{folder}/bin/python", "PATH": path, "OUTPUT_DIR": "out"}
    return run_script(RUN, cwd=folder, **{**fixed, **env})


def arguments_of(folder: Path, **env: str) -> list[str]:
    """Return the launcher's arguments, and the ranks' variables for devices as the last word."""
    done = run(folder, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def launched(folder: Path, **env: str) -> tuple[list[str], str]:
    """Return the launcher's arguments before the program, and the ranks' DS_ACCELERATOR."""
    arguments = arguments_of(folder, **env)
    accelerator, visible = arguments.pop().split(" ")
    assert visible == "unset", "the launcher would drop the variable and say so"
    program = next(i for i, word in enumerate(arguments) if word.endswith("pretrain_gpt.py"))
    return arguments[:program], accelerator


def resources(words: list[str]) -> dict[str, list[int]]:
    """Return the devices by host that DeepSpeed's launcher would use on four GPUs."""
    from deepspeed.launcher import runner

    args = runner.parse_args([*words, "program.py"])
    assert not args.include or args.num_gpus == args.num_nodes == -1, "it refuses both"
    pool = runner.fetch_hostfile(args.hostfile) or {"localhost": 4}
    found = runner.parse_inclusion_exclusion(pool, args.include, args.exclude)
    return dict(runner.apply_num_nodes_and_gpus(found, args.num_nodes, args.num_gpus))


@pytest.mark.parametrize(
    "env, devices",
    [
        ({}, [0, 1, 2, 3]),
        ({"NUM_GPUS": "3"}, [0, 1, 2]),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": " 2, 3"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "NUM_GPUS": "1"}, [2]),
        ({"CUDA_VISIBLE_DEVICES": "3,-1,2"}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-2abc,GPU-0"}, [0, 2]),
    ],
)
def test_visible_gpus_are_used(env, devices, tmp_path):
    words, accelerator = launched(tmp_path, gpus=FOUR_GPUS, **env)
    assert resources(words) == {"localhost": devices} and accelerator == ""


@pytest.mark.parametrize(
    "gpus, env",
    [
        (FOUR_GPUS, {"CUDA_VISIBLE_DEVICES": ""}),
        (FOUR_GPUS, {"CUDA_VISIBLE_DEVICES": "-1"}),
        (FOUR_GPUS, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}),
        (FOUR_GPUS, {"DS_ACCELERATOR": "cpu"}),
        ("", {}),
        ("", {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ("NVIDIA-SMI has failed because it could not communicate with the driver.", {}),
    ],
)
def test_no_visible_gpu_means_cpu(gpus, env, tmp_path):
    words, accelerator = launched(tmp_path, gpus=gpus, **env)
    assert resources(words) == {"localhost": [0]} and accelerator == "cpu"


def test_only_gpus_are_counted(tmp_path):
    """nvidia-smi also lists the parts of a GPU."""
    assert resources(launched(tmp_path, gpus=SPLIT_GPU)[0]) == {"localhost": [0]}


@pytest.mark.parametrize("hostfile", [None, "a slots=2\nb slots=2\n"])
def test_visible_gpus_of_a_node_are_used(hostfile, tmp_path):
    """Without ssh, each node selects its own GPUs."""
    env = {**NODE_1, "CUDA_VISIBLE_DEVICES": "1,3"}
    if hostfile is None:
        env["NUM_GPUS"] = "2"
    else:
        (tmp_path / "hosts").write_text(hostfile)
        env["HOSTFILE"] = str(tmp_path / "hosts")
    words, _ = launched(tmp_path, gpus=FOUR_GPUS, **env)
    words[words.index("--hostfile") + 1] = str(tmp_path / "out/hostfile.node-1")
    assert resources(words) == {"node-0": [0, 1], "node-1": [1, 3]}


def test_first_gpus_of_all_nodes_need_no_choice(tmp_path):
    """A scheduler may set the variable to all GPUs of the first node."""
    (tmp_path / "hosts").write_text(HOSTS)
    hosts = {"HOSTFILE": str(tmp_path / "hosts")}
    env = {**hosts, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert resources(launched(tmp_path, gpus=FOUR_GPUS, **env)[0]) == {"a": [0, 1], "b": [0, 1]}
    assert launched(tmp_path, gpus=FOUR_GPUS, **{**env, "CUDA_VISIBLE_DEVICES": ""})[1] == "cpu"


@pytest.mark.parametrize(
    "env, message",
    [
        (
            {"CUDA_VISIBLE_DEVICES": "2,4"},
            "CUDA_VISIBLE_DEVICES is '2,4'; allowed: numbers from 0 to 3, or UUIDs GPU-... of "
            "the 4 GPU(s) that nvidia-smi lists",
        ),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1"}, "CUDA_VISIBLE_DEVICES is 'MIG-1'; allowed"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, "CUDA_VISIBLE_DEVICES is 'GPU-'; allowed"),
        ({"CUDA_VISIBLE_DEVICES": "1,,2"}, "CUDA_VISIBLE_DEVICES is '1,,2'; allowed"),
        (
            {"CUDA_VISIBLE_DEVICES": "1,01"},
            "CUDA_VISIBLE_DEVICES is '1,01', which names GPU 1 twice",
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "2,3", "NUM_GPUS": "4"},
            "NUM_GPUS is 4; allowed with CUDA_VISIBLE_DEVICES '2,3': at most 2",
        ),
        ({"NUM_GPUS": "5"}, "NUM_GPUS is 5; allowed: at most 4, the number of GPUs"),
        (
            {"CUDA_VISIBLE_DEVICES": "2,3", "HOSTFILE": "hosts"},
            "CUDA_VISIBLE_DEVICES is '2,3', which does not reach the nodes of HOSTFILE 'hosts'; "
            "unset it, or start each node by itself with NODE_RANK",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun or mpirun started it 4 times"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "srun or mpirun started it 2 times"),
        ({"DATA_PATH": "it's"}, "DATA_PATH is it's: xargs: "),
    ],
)
def test_contradictory_devices_are_one_line(env, message, tmp_path):
    (tmp_path / "hosts").write_text(HOSTS)
    done = run(tmp_path, gpus=FOUR_GPUS, **env)
    assert done.returncode == 2 and done.stderr.startswith(f"run.sh: {message}"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_one_task_per_node_may_use_srun(tmp_path):
    env = {**NODE_1, "NUM_GPUS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert "--node_rank" in launched(tmp_path, gpus=FOUR_GPUS, **env)[0]


def test_output_folder_must_be_writable(tmp_path):
    (tmp_path / "file").touch()
    done = run(tmp_path, OUTPUT_DIR="file/out")
    assert done.returncode == 2
    assert done.stderr == (
        "run.sh: OUTPUT_DIR is 'file/out', in which no file can be written; choose another one\n"
    )


@pytest.mark.parametrize(
    "value, words",
    [
        ("'my data/corpus'", ("my data/corpus",)),
        ('0.3 "a b" 0.7 c\\ d', ("0.3", "a b", "0.7", "c d")),
        ("a\n  b", ("a", "b")),
        ('"it\'s" *', ("it's", "*")),
        ("'größe/日本'", ("größe/日本",)),
    ],
)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_data_paths_may_have_blanks(value, words, locale, tmp_path):
    arguments = arguments_of(tmp_path, DATA_PATH=value, LC_ALL=locale)[:-1]
    assert config_of(arguments).data.data_path == words
    names = ("STREAMING_DATA_PATH", "VALID_DATA_PATH", "TEST_DATA_PATH")
    paths = dict.fromkeys(names, value)
    data = config_of(arguments_of(tmp_path, LC_ALL=locale, **paths)[:-1]).data
    assert data.streaming_data_path == data.valid_data_path == data.test_data_path == words


def flags_of(folder: Path, **env: str) -> list[str]:
    done = run(folder, DRY_RUN="1", **env)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[0])


def test_flags_that_cannot_apply_are_left_out(tmp_path):
    """The program refuses a flag without effect, unless the user has set it."""
    usual = flags_of(tmp_path)
    assert {"--lr-warmup-fraction", "--eval-interval"} < set(usual)
    unlimited = flags_of(tmp_path, MOE_DROP_TOKEN="false")
    assert not {word for word in unlimited if "capacity" in word}
    assert "--lr-warmup-fraction" not in flags_of(tmp_path, WARMUP_FRACTION="0.0")
    assert "--eval-interval" not in flags_of(tmp_path, EVAL_ITERS="0")
    dense = flags_of(tmp_path, EP_SIZE="0")
    assert not {word for word in dense if "moe" in word or "expert" in word or "gate" in word}
    assert "--moe-min-capacity" in flags_of(tmp_path, MOE_MIN_CAP="8")
    files = flags_of(tmp_path, GATE_PATH=f"'{__file__}' b.py")
    assert files[files.index("--gate-path") + 1 :][:2] == [__file__, "b.py"]
    clamped = flags_of(tmp_path, EXPERT_TYPE="swiglu_clamped")
    assert clamped[clamped.index("--expert-type") + 1] == "swiglu_clamped"
    assert "--expert-type" not in usual
    limited = flags_of(tmp_path, MOE_TRAIN_CAP_FACTOR="0", MOE_EVAL_CAP_FACTOR="2")
    assert [word for word in limited if "capacity" in word] == ["--moe-eval-capacity-factor"]


FAILURES = {
    "error of rank 0": (
        "echo start; echo 'error: --lr is -1' >&2; echo '[rank 1] error: another rank ended'",
        "error: --lr is -1\n",
    ),
    "error of another rank": (
        "echo 'error: rank 1 ended, and its message says why' >&2; "
        "echo '[rank 1] error: no file'; echo more",
        "[rank 1] error: no file\n",
    ),
    "only the news": (
        "echo 'error: another rank ended, and its message says why'; echo more",
        "error: another rank ended, and its message says why\n",
    ),
    "over ssh": ("echo 'node-1: error: no file'; echo more", "node-1: error: no file\n"),
    "last line": ("echo more; echo 'error: no file'", ""),
    "traceback": (
        "echo '[rank0]: Traceback'; echo '[rank0]: a.b.SomeError: no'; echo more",
        "[rank0]: a.b.SomeError: no\n",
    ),
    "traceback of a rank and the end of another": (
        "echo 'error: another rank ended, and its message says why'; "
        "echo '[rank1]: Traceback'; echo 'SomeError: no'; echo more",
        "SomeError: no\n",
    ),
    "signal before the error": (
        "echo 'error: SIGTERM outside of the training loop: this process ends'; "
        "echo '[rank 1] error: no file'; echo more",
        "[rank 1] error: no file\n",
    ),
    "signal before the news": (
        "echo '[rank 2] error: SIGTERM outside of the training loop: this process ends'; "
        "echo '[rank 1] error: another rank ended'; echo more",
        "[rank 1] error: another rank ended\n",
    ),
    "only signals": (
        "echo 'error: SIGINT outside of the training loop: this process ends'; echo more",
        "error: SIGINT outside of the training loop: this process ends\n",
    ),
    "nothing": ("echo start; printf '\\0\\377 error: no\\n'", ""),
    "bytes of no text": (
        "printf '\\0\\377\\n'; echo 'error: größe'; printf '\\377\\n'",
        "error: größe\n",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_failed_run_ends_with_its_error(name, locale, tmp_path):
    """The error of an earlier run in the same log is not repeated."""
    script, error = FAILURES[name]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.txt").write_text("error: of another run\n")
    stand_in(tmp_path, "deepspeed", f"{{ {script}; }}; exit 3")
    done = subprocess.run(
        ["bash", str(RUN)],
        capture_output=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "PYTHON": f"{tmp_path}/bin/python",
            "OUTPUT_DIR": "out",
            "LC_ALL": locale,
        },
        timeout=60,
    )
    assert done.returncode == 3
    assert done.stderr.decode() == f"{error}run.sh: exit code 3; log: out/log.txt\n"


RANKS = """
while [[ $1 != *pretrain_gpt.py ]]; do shift; done
export WORLD_SIZE=2 LOCAL_RANK=0
RANK=0 "$PYTHON" "$@" & rank0=$!
RANK=1 "$PYTHON" "$@" & rank1=$!
wait $rank1
code=$?
kill -TERM $rank0
wait $rank0
exit $code
"""
FAILS_ON_RANK_1 = """
import os, pathlib, time
if os.environ["RANK"] == "1":
    while not pathlib.Path("rank-0-is-starting").exists():
        time.sleep(0.01)
    raise RuntimeError("a library is broken")
pathlib.Path("rank-0-is-starting").touch()
time.sleep(600)
"""


def test_traceback_while_starting_is_the_cause(tmp_path):
    """The launcher ends rank 0 by SIGTERM when rank 1 has failed, here during its imports."""
    stand_in(tmp_path, "nvidia-smi", "exit 127")
    stand_in(tmp_path, "deepspeed", RANKS)
    stand_in(tmp_path, "python", f'exec {shlex.quote(sys.executable)} "$@"')
    (tmp_path / "torch.py").write_text(FAILS_ON_RANK_1)
    done = run_script(
        RUN,
        cwd=tmp_path,
        PYTHON=f"{tmp_path}/bin/python",
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        PYTHONPATH=str(tmp_path),
        NUM_GPUS="2",
        OUTPUT_DIR="out",
    )
    assert "Traceback" in done.stdout and "error: SIGTERM outside of" in done.stdout, (
        done.stdout
    )
    assert done.returncode == 1
    assert done.stderr == (
        "RuntimeError: a library is broken\nrun.sh: exit code 1; log: out/log.txt\n"
    )


def test_launcher_is_quiet(tmp_path):
    """Its log of commands would bury the error."""
    assert launched(tmp_path)[0][:2] == ["--log_level", "critical"]


def test_incomplete_log_is_reported(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.txt").symlink_to("/dev/full")
    stand_in(tmp_path, "deepspeed", "echo line; exit 0")
    done = run(tmp_path)
    assert done.returncode == 0
    assert done.stderr.endswith(
        "run.sh: out/log.txt is not complete, because tee could not write it\n"
    )
