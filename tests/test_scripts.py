"""Tests of the shipped scripts: flags of every example parse; run.sh prints what it would run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.scripts import config_of, run_script

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    [*REPO.glob("examples_deepspeed/**/*.sh"), *REPO.glob("dataset/*.sh"), REPO / ".ci/run"]
)
PROGRAMS = sorted(
    [
        *REPO.glob("tools/*.py"),
        REPO / "dataset/make_corpus.py",
        REPO / "pretrain_gpt.py",
        REPO / "benchmarks/train_step.py",
        REPO / "benchmarks/gate_cost.py",
    ]
)
RUN = REPO / "examples_deepspeed/MoE/run.sh"


def sh(argv, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHON": sys.executable, **env},
    )


def dry(cwd, *more, **env) -> tuple[list[str], str]:
    """Return (words of the command that run.sh prints, the rest of its output).

    `echo` replaces Python, which would need two seconds to print the model's size.
    """
    done = run_script(RUN, *more, cwd=cwd, **{"DRY_RUN": "1", "PYTHON": "/bin/echo", **env})
    assert done.returncode == 0, done.stderr
    command, rest = done.stdout.split("\n", 1)
    return shlex.split(command), rest


NO_SSH = {"NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1", "NUM_NODES": "2", "NUM_GPUS": "4"}


def launcher_of(words: list[str]):
    """Return what DeepSpeed's launcher parses from the command."""
    from deepspeed.launcher.runner import parse_args

    return parse_args(words[1:])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.relative_to(REPO).as_posix())
def test_scripts_parse_and_stop_on_errors(path):
    assert sh(["bash", "-n", str(path)]).returncode == 0
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.relative_to(REPO).as_posix())
def test_help_works_from_any_folder(path, tmp_path):
    done = subprocess.run(
        [sys.executable, str(path), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_the_reference_recipe(tmp_path):
    words, size = dry(tmp_path, NUM_GPUS="8", PYTHON=sys.executable)
    config = config_of(words)
    m, e, o, t = config.model, config.moe, config.optimizer, config.train
    assert (
        m.num_layers,
        m.hidden_size,
        m.num_attention_heads,
        m.seq_length,
        m.init_method_std,
    ) == (12, 768, 12, 1024, 0.014)
    assert (e.num_experts, e.moe_ffn_hidden_size, e.expert_interval, e.gate) == (
        64,
        384,
        2,
        "threshold",
    )
    options = config.gate_options["threshold"]
    assert options["threshold"] == 0.9 and options["loss_coeff"] == 0.01
    assert (t.global_batch_size, t.train_iters, o.lr, o.min_lr) == (256, 60000, 4.5e-4, 4.5e-6)
    assert o.lr_warmup_fraction == 0.1
    assert (o.adam_beta1, o.adam_beta2, o.weight_decay, o.clip_grad, o.bf16) == (
        0.9,
        0.95,
        0.1,
        1.0,
        True,
    )
    assert e.moe_expert_parallel_size == 8 and e.moe_aux_loss_reduction == "sum"
    assert (e.moe_train_capacity_factor, e.moe_eval_capacity_factor) == (8.0, 8.0)
    assert config.gate_options["threshold"]["threshold_max_experts"] == 0
    assert "total" in size.lower() and "active" in size.lower()


VARIABLES = {
    "NUM_LAYERS": "2",
    "HIDDEN_SIZE": "64",
    "FFN_HIDDEN_SIZE": "96",
    "MOE_FFN_HIDDEN_SIZE": "48",
    "NUM_ATTN_HEADS": "4",
    "SEQ_LEN": "128",
    "GLOBAL_BATCH_SIZE": "32",
    "BATCH_SIZE": "2",
    "TRAIN_TOKENS": "1000000",
    "LR": "1e-3",
    "MIN_LR": "1e-5",
    "WARMUP_FRACTION": "0.2",
    "EP_SIZE": "8",
    "EP_PARALLEL_SIZE": "2",
    "EP_INTERVAL": "2",
    "MAX_EXPERTS": "3",
    "THRESHOLD": "0.7",
    "GATE": "threshold",
    "MLC": "0.05",
    "MOE_TRAIN_CAP_FACTOR": "2.0",
    "MOE_EVAL_CAP_FACTOR": "3.0",
    "MOE_MIN_CAP": "8",
    "LOG_INTERVAL": "5",
    "EVAL_INTERVAL": "7",
    "EVAL_ITERS": "3",
    "SAVE_INTERVAL": "11",
    "INIT_STD": "0.03",
    "ACTIVATION_CHECKPOINT": "true",
    "VOCAB_PATH": "v.json",
    "MERGE_PATH": "m.txt",
    "DATA_PATH": "0.3 a 0.7 b",
    "OUTPUT_DIR": "o",
    "NUM_GPUS": "4",
    "NUM_NODES": "2",
    "HOSTFILE": "hosts",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "1234",
    "ZERO_STAGE": "2",
    "SEED": "9",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Command that run.sh prints with every variable set."""
    folder = tmp_path_factory.mktemp("variables")
    (folder / "hosts").write_text("a slots=4\nb slots=4\n")
    return dry(folder, **VARIABLES)[0]


def test_model_variables_arrive(words):
    c = config_of(words)
    assert (
        c.model.num_layers,
        c.model.hidden_size,
        c.model.ffn_hidden_size,
        c.model.num_attention_heads,
        c.model.seq_length,
        c.model.init_method_std,
    ) == (2, 64, 96, 4, 128, 0.03)
    assert (
        c.moe.num_experts,
        c.moe.moe_ffn_hidden_size,
        c.moe.moe_expert_parallel_size,
        c.moe.expert_interval,
        c.moe.moe_train_capacity_factor,
        c.moe.moe_eval_capacity_factor,
        c.moe.moe_min_capacity,
    ) == (8, 48, 2, 2, 2.0, 3.0, 8)
    assert (
        c.gate_options["threshold"]["threshold_max_experts"],
        c.gate_options["threshold"]["threshold"],
        c.gate_options["threshold"]["loss_coeff"],
    ) == (3, 0.7, 0.05)


def test_training_variables_arrive(words):
    c = config_of(words)
    t, o = c.train, c.optimizer
    assert (t.global_batch_size, t.micro_batch_size, t.train_tokens, t.train_iters, t.seed) == (
        32,
        2,
        1000000,
        0,
        9,
    )
    assert (o.lr, o.min_lr, o.lr_warmup_fraction) == (1e-3, 1e-5, 0.2)
    assert c.deepspeed.zero_stage == 2
    assert (t.log_interval, t.eval_interval, t.eval_iters) == (5, 7, 3)
    assert c.checkpoint.save_interval == 11
    assert t.recompute_activations and c.data.data_path == ("0.3", "a", "0.7", "b")
    assert (c.tokenizer.vocab_file, c.tokenizer.merge_file) == ("v.json", "m.txt")
    logging = c.logging
    assert logging.wandb_project == ""
    assert (c.checkpoint.save, logging.metrics_file, logging.tensorboard_dir) == (
        "o/checkpoints",
        "o/metrics.jsonl",
        "o/tensorboard",
    )


@pytest.mark.parametrize(
    "variables, name, folder",
    [({}, "n", "o"), ({"WANDB_NAME": "a b", "WANDB_DIR": "w"}, "a b", "w")],
)
def test_wandb_variables_arrive(variables, name, folder, tmp_path):
    fixed = {"WANDB_PROJECT": "my project", "NAME": "n", "OUTPUT_DIR": "o"}
    logging = config_of(dry(tmp_path, **fixed, **variables)[0]).logging
    found = (logging.wandb_project, logging.wandb_exp_name, logging.wandb_save_dir)
    assert found == ("my project", name, folder)


def test_run_length_in_samples_arrives(tmp_path):
    words, _ = dry(tmp_path, TRAIN_SAMPLES="5000", TRAIN_ITERS="7")
    train = config_of(words).train
    assert (train.train_samples, train.train_iters, train.train_tokens) == (5000, 0, 0)


def test_launcher_variables_arrive(words):
    launcher = launcher_of(words)
    assert (launcher.num_gpus, launcher.num_nodes, launcher.hostfile, launcher.no_ssh) == (
        4,
        2,
        "hosts",
        False,
    )
    assert (launcher.master_addr, launcher.master_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize(
    "env, nodes, ranks",
    [
        ({}, 3, 4),
        ({"NUM_NODES": "2"}, 2, 4),
        ({"NUM_GPUS": "2"}, 3, 2),
        ({"NODE_RANK": "2", "MASTER_ADDR": "a"}, 3, 4),
    ],
)
def test_hostfile_sets_nodes_and_ranks(env, nodes, ranks, tmp_path):
    (tmp_path / "hosts").write_text(
        "# ours\na slots=4\n\n  b  slots=4 # the old one\nc slots=4"
    )
    words, _ = dry(
        tmp_path,
        PYTHON="/bin/echo",
        HOSTFILE="hosts",
        EP_SIZE="24",
        GLOBAL_BATCH_SIZE="48",
        **env,
    )
    launcher, config = launcher_of(words), config_of(words)
    assert (launcher.num_nodes, launcher.num_gpus, launcher.hostfile) == (nodes, ranks, "hosts")
    assert config.moe.moe_expert_parallel_size == nodes * ranks
    assert config.train.micro_batch_size == 48 // (nodes * ranks)
    assert (launcher.no_ssh, launcher.node_rank) == (
        ("NODE_RANK" in env),
        int(env.get("NODE_RANK", -1)),
    )
    assert launcher.force_multi != launcher.no_ssh, "one host of a file is not this machine"


def test_uneven_nodes_run_equal_ranks(tmp_path):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=4\n")
    for env, number in (({"NUM_GPUS": "4"}, 4), ({"NUM_NODES": "1"}, 8)):
        assert launcher_of(dry(tmp_path, HOSTFILE="hosts", **env)[0]).num_gpus == number


def test_node_rank_disables_ssh(tmp_path):
    words, _ = dry(
        tmp_path, **{**NO_SSH, "NODE_RANK": "1", "OUTPUT_DIR": "o", "PYTHON": "/bin/echo"}
    )
    launcher = launcher_of(words)
    assert (launcher.no_ssh, launcher.node_rank, launcher.master_addr) == (True, 1, "10.0.0.1")
    assert (launcher.num_nodes, launcher.num_gpus, launcher.hostfile) == (
        2,
        4,
        "o/hostfile.node-1",
    )
    assert config_of(words).moe.moe_expert_parallel_size == 8 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "env, hosts, message",
    [
        (
            {"NUM_NODES": "2"},
            None,
            "NUM_NODES is 2 but HOSTFILE is empty; set HOSTFILE to a file with a line "
            "'name slots=1'",
        ),
        ({"NUM_NODES": "two"}, None, "NUM_NODES is 'two'; allowed: a positive integer"),
        ({"NUM_GPUS": "0"}, None, "NUM_GPUS is '0'; allowed: a positive integer"),
        (
            {**NO_SSH, "MASTER_ADDR": ""},
            None,
            "NODE_RANK is set; also set MASTER_ADDR to the address of node 0",
        ),
        (
            {**NO_SSH, "NUM_GPUS": ""},
            None,
            "NODE_RANK is set; also set NUM_NODES and NUM_GPUS, or HOSTFILE",
        ),
        (
            {**NO_SSH, "NUM_NODES": ""},
            None,
            "NODE_RANK is set; also set NUM_NODES and NUM_GPUS, or HOSTFILE",
        ),
        (
            {**NO_SSH, "NODE_RANK": "2"},
            None,
            "NODE_RANK is '2'; allowed with 2 node(s): 0 to 1",
        ),
        (
            {**NO_SSH, "NODE_RANK": "-1"},
            None,
            "NODE_RANK is '-1'; allowed with 2 node(s): 0 to 1",
        ),
        (
            {**NO_SSH, "NODE_RANK": "a"},
            None,
            "NODE_RANK is 'a'; allowed with 2 node(s): 0 to 1",
        ),
        (
            {"HOSTFILE": "hosts"},
            None,
            "HOSTFILE is 'hosts', which is not a file; create one with a line 'name slots=8' per",
        ),
        (
            {"HOSTFILE": "hosts"},
            "\n# none\n",
            "HOSTFILE is 'hosts': it has no line of the form 'name slots=8'",
        ),
        (
            {"HOSTFILE": "hosts"},
            "a slots=4\nb 4\n",
            "HOSTFILE is 'hosts': line 2 is 'b 4'; allowed: 'name slots=8'",
        ),
        (
            {"HOSTFILE": "hosts"},
            "a slots=0\n",
            "HOSTFILE is 'hosts': line 1 is 'a slots=0'; allowed: 'name slots=8'",
        ),
        (
            {"HOSTFILE": "hosts"},
            "a slots=4\na slots=4\n",
            "HOSTFILE is 'hosts': line 2 lists a twice",
        ),
        (
            {"HOSTFILE": "hosts"},
            "a slots=4\nb slots=2\nc slots=8\n",
            "HOSTFILE is 'hosts': its nodes have 2 to 8 slots, but every node runs the same "
            "number of ranks; set "
            "NUM_GPUS to at most 2",
        ),
        (
            {"HOSTFILE": "hosts", "NUM_GPUS": "3"},
            "a slots=4\nb slots=2\n",
            "NUM_GPUS is 3; allowed with HOSTFILE 'hosts': at most 2, the smallest number of slots",
        ),
        (
            {"HOSTFILE": "hosts", "NUM_NODES": "2"},
            "a slots=4\n",
            "NUM_NODES is 2; allowed with HOSTFILE 'hosts': at most 1",
        ),
        (
            {"HOSTFILE": "hosts", "NODE_RANK": "1", "MASTER_ADDR": "a"},
            "a slots=4\n",
            "NODE_RANK is '1'; allowed with 1 node(s): 0 to 0",
        ),
    ],
)
def test_contradictory_nodes_are_one_line(env, hosts, message, tmp_path):
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    done = launch(tmp_path, "echo started", **env)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.startswith(f"run.sh: {message}")
    ), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def launch(folder: Path, launcher: str, **env: str) -> subprocess.CompletedProcess:
    """Run run.sh with a shell program in place of DeepSpeed's launcher."""
    process = start(folder, launcher, **env)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, stdout, stderr)


def start(folder: Path, launcher: str, **env: str) -> subprocess.Popen:
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "deepspeed").write_text(f"#!/bin/bash\n{launcher}\n")
    (programs / "deepspeed").chmod(0o755)
    env = {
        "OUTPUT_DIR": str(folder / "out"),
        "PYTHON": str(programs / "python"),
        "HOME": str(folder),
        **env,
    }
    return subprocess.Popen(
        ["bash", str(RUN)],
        text=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **env},
    )


def test_nodes_without_ssh_share_folder(tmp_path):
    """Each node has its own log and hostfile; the exit status is that of the launcher."""
    from deepspeed.launcher.runner import fetch_hostfile

    for rank, name in (("0", "log.txt"), ("1", "log.node-1.txt")):
        done = launch(
            tmp_path, f"echo node {rank} >&2; exit 7", **{**NO_SSH, "NODE_RANK": rank}
        )
        assert done.returncode == 7 and done.stdout == f"node {rank}\n"
        assert (tmp_path / "out" / name).read_text() == f"node {rank}\n"
        hosts = fetch_hostfile(str(tmp_path / f"out/hostfile.node-{rank}"))
        assert hosts == {"node-0": 4, "node-1": 4}


def test_ssh_exports_environment(tmp_path):
    """The launcher exports one file of variables: ours, then those of the user's file."""
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\n")
    (tmp_path / ".deepspeed_env").write_text("\nMINE=1")
    env = {
        "HOSTFILE": "hosts",
        "GLOO_SOCKET_IFNAME": "eth7",
        "OMP_NUM_THREADS": "3",
        "DS_ACCELERATOR": "cpu",
    }
    done = launch(tmp_path, 'cat "$DS_ENV_FILE"', **env)
    assert done.returncode == 0, done.stderr
    got = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert got.pop("PATH").startswith(f"{tmp_path}/bin:") and got.pop("MINE") == "1"
    assert got == {
        name: env[name] for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    }
    done = launch(tmp_path, 'cat "$DS_ENV_FILE"', **{**env, "DS_ACCELERATOR": ""})
    assert "DS_ACCELERATOR" not in done.stdout, "the nodes may have GPUs"
    done = launch(tmp_path, 'echo "$DS_ENV_FILE"', **env, DS_ENV_FILE="/my/own")
    assert done.stdout == "/my/own\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_output_after_signal_is_logged(number, tmp_path):
    """A signal to all processes, as from Ctrl-C, does not end the one that writes the log."""
    process = start(
        tmp_path,
        """trap 'kill $! 2>&-; echo saved; exit 0' INT TERM
                                 echo started; sleep 60 >/dev/null & wait""",
    )
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, number)
    assert process.communicate(timeout=30)[0] == "saved\n"
    assert (tmp_path / "out/log.txt").read_text() == "started\nsaved\n"


def test_gate_per_layer_is_a_variable(tmp_path):
    """The list takes the place of EP_INTERVAL, and the default folder has a portable name."""
    words, _ = dry(tmp_path, GATE="dense@0,hash@1,threshold@2-", OUTPUT_DIR="")
    config = config_of(words)
    assert config.moe.gates(4) == [None, "hash", "threshold", "threshold"]
    assert config.moe.expert_interval == 1
    assert config.gate_options["threshold"]["threshold"] == 0.9
    assert "e-dense-0-hash-1-threshold-2--t0.9/" in config.checkpoint.save
    assert config.model.ffn_hidden_size == 4 * config.model.hidden_size


def test_gate_variables_follow_the_gate(tmp_path):
    assert config_of(dry(tmp_path, GATE="topk", TOPK="4")[0]).gate_options["topk"]["topk"] == 4
    dense = config_of(dry(tmp_path, EP_SIZE="0")[0])
    assert dense.moe.num_experts == 0 and dense.moe.moe_expert_parallel_size == 1
    assert config_of(dry(tmp_path, "--seed", "77")[0]).train.seed == 77


@pytest.mark.parametrize(
    "env, train, evaluation",
    [
        ({}, 8, 8),
        ({"MOE_DROP_TOKEN": "true"}, 8, 8),
        ({"MOE_DROP_TOKEN": "false"}, 0, 0),
        ({"MOE_TRAIN_CAP_FACTOR": "2"}, 2, 2),
        ({"MOE_TRAIN_CAP_FACTOR": "0"}, 0, 0),
        ({"MOE_EVAL_CAP_FACTOR": "2"}, 8, 2),
        ({"MOE_DROP_TOKEN": "false", "MOE_TRAIN_CAP_FACTOR": "2"}, 0, 0),
        ({"GATE": "topk"}, 0, 0),
        ({"GATE": "topk", "MOE_DROP_TOKEN": "true"}, 1.25, 1.25),
        ({"GATE": "moepp", "MOE_DROP_TOKEN": "true"}, 1.1, 1.1),
        ({"GATE": "topk", "MOE_EVAL_CAP_FACTOR": "2"}, 0, 2),
    ],
)
def test_capacity_variables_set_factors(env, train, evaluation, tmp_path):
    moe = config_of(dry(tmp_path, **env)[0]).moe
    assert (moe.moe_train_capacity_factor, moe.moe_eval_capacity_factor) == (train, evaluation)


def test_drop_token_is_true_or_false(tmp_path):
    done = run_script(RUN, cwd=tmp_path, DRY_RUN="1", MOE_DROP_TOKEN="yes")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "run.sh: MOE_DROP_TOKEN is 'yes'; allowed: true or false\n"


@pytest.mark.parametrize(
    "batch, ranks, micro", [("20", "1", 10), ("256", "8", 16), ("6", "2", 3), ("7", "7", 1)]
)
def test_default_micro_batch_divides_global_batch(batch, ranks, micro, tmp_path):
    train = config_of(
        dry(tmp_path, GLOBAL_BATCH_SIZE=batch, NUM_GPUS=ranks, EP_PARALLEL_SIZE="1")[0]
    ).train
    assert train.micro_batch_size == micro and train.global_batch(int(ranks)) == int(batch)


def test_variable_of_other_gate_is_refused(tmp_path):
    done = run_script(RUN, cwd=tmp_path, DRY_RUN="1", GATE="topk", THRESHOLD="0.5")
    assert done.returncode == 2 and "--threshold" in done.stderr


def test_same_output_folder_resumes(tmp_path):
    """A run resumes from its own folder if it can; --load must name a checkpoint."""
    checkpoint = config_of(dry(tmp_path, OUTPUT_DIR="out")[0]).checkpoint
    assert (checkpoint.load, checkpoint.save, checkpoint.load_or_init) == (
        "out/checkpoints",
        "out/checkpoints",
        True,
    )
    for words in (("--load", "elsewhere"), ("--load=elsewhere",)):
        checkpoint = config_of(dry(tmp_path, *words, OUTPUT_DIR="out")[0]).checkpoint
        assert (checkpoint.load, checkpoint.load_or_init) == ("elsewhere", False)


def test_demo_shapes_match_the_benchmark():
    """benchmarks/train_step.py repeats the demo's shapes."""
    sys.path.insert(0, str(REPO))
    from benchmarks import train_step

    script = (REPO / "examples_deepspeed/MoE/demo.sh").read_text()
    model, moe, _, train = train_step.configs()
    for name, value in (
        ("NUM_LAYERS", model.num_layers),
        ("HIDDEN_SIZE", model.hidden_size),
        ("NUM_ATTN_HEADS", model.num_attention_heads),
        ("SEQ_LEN", model.seq_length),
        ("INIT_STD", model.init_method_std),
        ("EP_SIZE", moe.num_experts),
        ("EP_INTERVAL", moe.expert_interval),
        ("MOE_FFN_HIDDEN_SIZE", moe.moe_ffn_hidden_size),
        ("GLOBAL_BATCH_SIZE", train.global_batch_size),
        ("BATCH_SIZE", train.micro_batch_size),
    ):
        assert f"{name}=${{{name}:-{value}}}" in script, name
