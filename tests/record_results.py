"""Record the results of short runs of a checkout, and compare two recordings.

    python tests/record_results.py --repo DIR --output before.json
    python tests/record_results.py --repo .   --output after.json
    python tests/record_results.py --compare before.json after.json

A recording holds the losses of 20 iterations and the SHA-256 of every tensor of the final
checkpoint, for every gate at ZeRO 1 and 2 in bf16 and fp32 on two ranks that shard the experts,
and the SHA-256 of preprocessed files. It uses what a user has: flags, metrics.jsonl and
safetensors files. A refactoring changes none of them, so the two recordings must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32
    --init-method-std 0.1 --tokenizer-type ByteTokenizer
    --make-vocab-size-divisible-by 1 --moe-expert-parallel-size 2 --split 80,15,5
    --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 5e-3 --min-lr 5e-4
    --lr-warmup-fraction 0.1 --eval-interval 10 --eval-iters 2 --log-interval 1
    --hidden-dropout 0.05
"""
MOE = "--num-experts 4 --moe-ffn-hidden-size 32 --expert-interval 1"
PEER = """
    --peer-num-experts 64 --peer-num-heads 4 --peer-topk 4 --peer-query-size 16
    --ffn-hidden-size 64
"""
GATES = """
    base blockffn cosine deepseek_v2 deepseek_v3 dynmoe expert_choice expert_threshold hash
    longcat moepp peer remoe tcmoe threshold topk
"""
FIELDS = ("loss", "aux_loss", "grad_norm", "lr")


def train_all(repo: Path, folder: Path, prefix: str) -> None:
    """In one of two ranks: train every configuration, one after the other, in this process."""
    sys.path.insert(0, str(repo))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.destroy_process_group = lambda *_: (
        None
    )  # DeepSpeed's groups outlive a run: the next one uses them again
    from megatron.pretrain import main

    for name, flags in configurations().items():
        out = folder / name
        code = main(
            [
                *flags,
                "--data-path",
                prefix,
                "--save",
                str(out / "checkpoints"),
                "--metrics-file",
                str(out / "metrics.jsonl"),
            ]
        )
        assert code == 0, f"{name} ended with exit code {code}"
        dist.barrier()


def configurations() -> dict[str, list[str]]:
    """Flags of every run, by its name."""
    runs = {}
    for gate in GATES.split():
        for stage in ("1", "2"):
            for precision in ("bf16", "fp32"):
                experts = PEER if gate == "peer" else MOE
                flags = f"{SHAPE} {experts} --gate {gate} --zero-stage {stage}".split()
                if precision == "bf16":
                    flags.append("--bf16")
                runs[f"{gate}-zero{stage}-{precision}"] = flags
    return runs


def preprocess(repo: Path, folder: Path) -> str:
    """Write a small corpus and its token files; returns their prefix."""
    lines = []
    for i in range(60):
        text = f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (4 + i % 5)
        lines.append(json.dumps({"text": text}))
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(
        [
            sys.executable,
            "tools/preprocess_data.py",
            "--input",
            str(corpus),
            "--output-prefix",
            str(folder / "data"),
            "--append-eod",
            "--tokenizer-type",
            "ByteTokenizer",
        ],
        cwd=repo,
        check=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
        stdout=subprocess.DEVNULL,
    )
    return str(folder / "data_text_document")


def tensor_digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor in the files of a checkpoint."""
    import torch
    from safetensors.torch import load_file

    digests = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digests[f"{file.name}:{name}"] = hashlib.sha256(content).hexdigest()
    return digests


def record(repo: Path, output: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = preprocess(repo, folder)
        results = {"files": {}, "runs": {}}
        for suffix in (".bin", ".idx"):
            results["files"][suffix] = hashlib.sha256(
                Path(prefix + suffix).read_bytes()
            ).hexdigest()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        ranks = []
        for rank in range(2):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
            }
            command = [
                sys.executable,
                __file__,
                "--repo",
                str(repo),
                "--rank-folder",
                str(folder),
                "--prefix",
                prefix,
            ]
            ranks.append(
                subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL if rank else None)
            )
        codes = [process.wait() for process in ranks]
        assert codes == [0, 0], f"the ranks ended with {codes}"
        for name in configurations():
            lines = [
                json.loads(line)
                for line in (folder / name / "metrics.jsonl").read_text().splitlines()
            ]
            (checkpoint,) = sorted(
                p.parent for p in (folder / name / "checkpoints").glob("*/index.json")
            )
            results["runs"][name] = {
                "losses": [
                    [line["kind"], *(line.get(field) for field in FIELDS)]
                    for line in lines
                    if line["kind"] != "run"  # earlier versions write none
                ],
                "tensors": tensor_digests(checkpoint),
            }
    output.write_text(json.dumps(results, indent=1))


def compare(before: Path, after: Path) -> int:
    a, b = (json.loads(path.read_text()) for path in (before, after))
    different = [
        f"preprocessed {suffix}"
        for suffix in a["files"]
        if a["files"][suffix] != b["files"].get(suffix)
    ]
    for name in sorted(set(a["runs"]) | set(b["runs"])):
        if a["runs"].get(name) != b["runs"].get(name):
            different.append(f"run {name}")
    losses = sum(len(run["losses"]) for run in a["runs"].values())
    tensors = sum(len(run["tensors"]) for run in a["runs"].values())
    print(
        f"{len(a['runs'])} runs, {losses} logged lines, {tensors} tensors,",
        f"{len(a['files'])} preprocessed files:",
        f"{len(different)} differ" if different else "all bit-identical",
    )
    for what in different:
        print("different:", what)
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repo", type=Path, default=Path.cwd(), help="checkout to record")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, nargs=2, help="two JSON files")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    repo = args.repo.resolve()
    if args.rank_folder:
        train_all(repo, args.rank_folder, args.prefix)
        os._exit(0)  # gloo's threads may still hold tensors
    if args.output is None:
        parser.error("--output is needed")
    record(repo, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
