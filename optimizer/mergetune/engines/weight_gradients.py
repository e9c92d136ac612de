"""The gradients of a transformers model's weights, one at a time and by their names in its checkpoint."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergetune.engines.stored_weights import StoredWeights


@contextmanager
def each_gradient(model: Any, names: Iterable[str], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand out each weight's gradient during backward passes, and free it at once.

    `take` is called once in each backward pass for each of these stored weights that it reaches, with
    the name and the whole gradient, in which all uses of a tied weight are summed. One gradient is
    alive at a time; no other weight gets one.
    """
    places = _places(model, names)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def hand_out(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None  # the hook runs after it was accumulated
        for place in places[id(parameter)]:
            take(place.name, place.part_of(gradient))

    handles = []
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in places)
            if id(parameter) in places:
                handles.append(parameter.register_post_accumulate_grad_hook(hand_out))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before:
            parameter.grad = None
            parameter.requires_grad_(required)


@contextmanager
def recomputed_activations(model: Any) -> Iterator[None]:
    """Compute the layers' activations a second time in the backward pass instead of keeping them.

    transformers does so in training only. The layers alone are told that they train, not what is in
    them, and dropout of their own is set to zero, so that the model computes what it does otherwise.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        for layer in layers:
            layer.training = False


@dataclass(frozen=True)
class _Place:
    """Where a stored weight lies in a parameter, which may be several of them fused into one.

    `offset` counts entries from the parameter's first, whose own stride is `whole_stride`.
    """

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    whole_stride: tuple[int, ...]

    def part_of(self, gradient: Tensor) -> Tensor:
        """Return the weight's part of the parameter's gradient."""
        if gradient.stride() != self.whole_stride:
            same = torch.empty_strided(
                gradient.shape, self.whole_stride, dtype=gradient.dtype, device=gradient.device
            )
            gradient = same.copy_(gradient)
        return gradient.as_strided(self.shape, self.stride, gradient.storage_offset() + self.offset)


def _places(model: Any, names: Iterable[str]) -> dict[int, list[_Place]]:
    """Return the places of stored weights by the id of the parameter that holds them; buffers have none."""
    stored, places = StoredWeights(model), defaultdict(list)
    parameters = sorted(model.parameters(), key=lambda each: each.data_ptr())
    for name in names:
        view = stored.get(name)
        holder = None if view is None else _holder(view, parameters)
        if view is not None and holder is not None:
            offset = (view.data_ptr() - holder.data_ptr()) // view.element_size()
            place = _Place(name, view.shape, view.stride(), offset, holder.stride())
            places[id(holder)].append(place)
    return dict(places)


def _holder(view: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """Return the parameter whose memory a view lies in; `parameters` in the order of their addresses."""
    position = bisect.bisect(parameters, view.data_ptr(), key=lambda each: each.data_ptr()) - 1
    if position < 0 or not view.is_floating_point():
        return None
    holder = parameters[position]
    return holder if view.data_ptr() < holder.data_ptr() + holder.nbytes else None
