"""What the tokens of a sample do in the dense layers of a model: activity and importance.

The model runs on one process. In memory are the model, the inputs of the layers (T x D numbers
each), one bit per token and neuron, and for the importance one number per expert and neuron.

Shape suffixes: T tokens of the sample, S those of one sequence, D hidden, W neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.interop.upcycle.clusters import balanced_kmeans
from megatron.interop.upcycle.dense_ffn import FFNStatistics, pack_bits
from megatron.interop.upcycle.experts import seeded
from megatron.model.gpt import GPT


def collect_activity(
    model: GPT,
    sequences: Sequence[Tensor],
    layers: Sequence[int],
    active_fraction: float,
) -> dict[int, FFNStatistics]:
    """Run the dense model, and record inputs and active neurons of its feed-forward layers.

    Args:
        sequences: int64 token ids [S] of each sequence; the last token is only predicted.
        layers: blocks of interest.
        active_fraction: a neuron counts as active for a token if its |h| is not 0 and among this
            fraction of the token's largest.
    """
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    active: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def record_input(layer: int, x_1SD: Tensor) -> None:
        inputs[layer].append(x_1SD[0].cpu())

    def record_active(layer: int, h_1SW: Tensor) -> None:
        size_SW = h_1SW[0].abs()
        count = max(1, int(active_fraction * size_SW.shape[1]))
        largest = size_SW.topk(count, dim=1).indices
        is_active_SW = torch.zeros_like(size_SW, dtype=torch.bool).scatter_(1, largest, True)
        active[layer].append(pack_bits((is_active_SW & (size_SW > 0)).cpu()))

    with (
        torch.no_grad(),
        _hooks(model, layers, "up_proj", record_input),
        _hooks(model, layers, "down_proj", record_active),
    ):
        for tokens_S in sequences:
            model(_on_device(tokens_S, model)[:, :-1])
    found = {}
    for layer in layers:
        found[layer] = FFNStatistics(torch.cat(inputs[layer]), torch.cat(active[layer]))
    return found


def add_importance(
    model: GPT,
    sequences: Sequence[Tensor],
    statistics: dict[int, FFNStatistics],
    num_clusters: int,
    seed: int,
) -> dict[int, FFNStatistics]:
    """Cluster the tokens of each layer, and add the importance of its neurons for the clusters.

    The importance of a neuron is |h dL/dh|, the first-order change of the language-model loss L
    without the neuron, averaged over the tokens of a cluster (LLaMA-MoE).

    Args:
        statistics: result of `collect_activity` for the same sequences.
        num_clusters: number of experts.
        seed: of the first centres of k-means.
    """
    found = {}
    sums: dict[int, Tensor] = {}
    position = dict.fromkeys(statistics, 0)
    for layer, old in statistics.items():
        generator = seeded(f"{seed}.{layer}.tokens")
        cluster_T = balanced_kmeans(old.x_TD, num_clusters, generator)
        found[layer] = replace(old, cluster_T=cluster_T)
        sums[layer] = torch.zeros(num_clusters, model.layers[layer].mlp.down_proj.in_features)

    def watch(layer: int, h_1SW: Tensor) -> None:
        start = position[layer]
        position[layer] = start + h_1SW.shape[1]
        cluster_S = found[layer].cluster_T[start : position[layer]]

        def add(gradient_1SW: Tensor) -> None:
            importance_SW = (h_1SW.detach() * gradient_1SW)[0].abs().cpu()
            sums[layer].index_add_(0, cluster_S, importance_SW)

        h_1SW.register_hook(add)

    with _activation_gradients(model), _hooks(model, list(statistics), "down_proj", watch):
        for tokens_S in sequences:
            tokens_1S = _on_device(tokens_S, model)
            model(tokens_1S[:, :-1], tokens_1S[:, 1:]).lm_loss_sum.backward()
    for layer, values in found.items():
        count_E = torch.bincount(values.cluster_T, minlength=num_clusters)
        mean_EW = sums[layer] / count_E.clamp_min(1)[:, None]
        found[layer] = replace(values, importance_EW=mean_EW)
    return found


def _on_device(tokens_S: Tensor, model: GPT) -> Tensor:
    """Return a batch of one sequence on the device of the model."""
    return tokens_S[None].to(model.embed_tokens.weight.device)


@contextmanager
def _hooks(
    model: GPT, layers: Sequence[int], projection: str, record: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call `record(layer, input [1, S, features])` for the inputs of a projection of each layer."""
    handles = []
    for layer in layers:

        def hook(module: nn.Module, args: tuple, layer: int = layer) -> None:
            record(layer, args[0])

        module = getattr(model.layers[layer].mlp, projection)
        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _activation_gradients(model: GPT) -> Iterator[None]:
    """Compute gradients of activations only, not of weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)

    def require_grad(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if output.dim() == 3:  # the embedding; with tied weights the module is called twice
            return output.requires_grad_()
        return output

    handle = model.embed_tokens.register_forward_hook(require_grad)
    try:
        yield
    finally:
        handle.remove()
        for p in trained:
            p.requires_grad_(True)
