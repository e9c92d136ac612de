"""A tensor that is computed when it is read, and only the part that is read.

Each rank of an engine takes of a tensor the rows or columns that it holds. Given a tensor of this kind, what
it does not take is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mergetune.merging.elementwise import row_length

Read = Callable[[slice, slice], Tensor]


class DeferredTensor(Tensor):
    """A tensor, or a view of one, that is computed when anything else than a view is made of it.

    Views (slices, transposes, other shapes) only say which entries are wanted. To copy it, or to compute with
    it, computes the smallest block of rows and columns that holds them; each time anew, so that nothing is
    kept. A copy to the meta device computes nothing. It cannot be written to.
    """

    _view: Tensor  # on the meta device: where the entries lie in the whole tensor, which lies in one block
    _row_length: int  # of the whole
    _read: Read

    @classmethod
    def of(cls, like: Tensor, read: Read) -> DeferredTensor:
        """Return a whole tensor.

        Args:
            like: a tensor of the same shape, dtype and device.
            read: computes a part of given rows and columns, as `elementwise.part_of` takes them.
        """
        whole = torch.empty(like.shape, dtype=like.dtype, device="meta")
        return cls._make(whole, like.device, row_length(like), read)

    @classmethod
    def _make(cls, view: Tensor, device: torch.device, length: int, read: Read) -> DeferredTensor:
        made: DeferredTensor = Tensor._make_wrapper_subclass(
            cls, view.shape, view.stride(), view.storage_offset(), dtype=view.dtype, device=device
        )
        made._view, made._row_length, made._read = view, length, read
        return made

    def _seen_as(self, view: Tensor) -> DeferredTensor:
        return self._make(view, self.device, self._row_length, self._read)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeferredTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follow a view; for anything else, compute what is read."""
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, cls):
            if func.is_view:
                views = func(first._view, *args[1:], **kwargs)
                if func is not torch.ops.aten.view.dtype:
                    return tree_map(first._seen_as, views)
            elif func._schema.is_mutable:
                raise RuntimeError("A tensor that is computed when it is read cannot be written to.")
        elif func is torch.ops.aten.copy_.default and args[0].is_meta:
            return first
        return func(*tree_map(_computed, args), **tree_map(_computed, kwargs))


def _computed(given: Any) -> Any:
    """Return the entries of a deferred tensor, and anything else as it is."""
    if not isinstance(given, DeferredTensor):
        return given
    view, length = given._view, given._row_length
    if view.numel() == 0:
        return torch.empty(view.shape, dtype=given.dtype, device=given.device)
    rows, columns, strides, offset = _block(view, length)
    n_read = (rows.stop - rows.start) * (columns.stop - columns.start)
    if n_read > view.numel() and view.ndim > 2:  # rows of several matrices: one matrix at a time
        return torch.stack([_computed(given._seen_as(each)) for each in view.unbind()])
    return given._read(rows, columns).as_strided(view.shape, strides, offset)


def _block(view: Tensor, length: int) -> tuple[slice, slice, list[int], int]:
    """Return the rows and columns in which the entries of a view lie, and its strides and offset there."""
    steps = [(size - 1, stride) for size, stride in zip(view.shape, view.stride(), strict=True) if size > 1]
    first = int(view.storage_offset())
    last = first + sum(n * stride for n, stride in steps)
    rows = slice(first // length, last // length + 1)
    begin, width = first % length, 1 + sum(n * stride for n, stride in steps if stride % length)
    if begin + width > length:  # it does not keep to columns, such as a matrix seen as a vector
        return rows, slice(0, length), list(view.stride()), begin
    strides = [stride if stride % length else stride // length * width for stride in view.stride()]
    return rows, slice(begin, begin + width), strides, 0
