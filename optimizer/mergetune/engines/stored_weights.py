"""A transformers model's weights by their names in its checkpoint, as views into the living model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mergetune.errors import MergetuneError
from mergetune.weights.architecture import stored_views
from mergetune.weights.tensor_files import shortened


class StoredWeights(Mapping[str, Tensor]):
    """The weights of a model by the names that `from_pretrained` read them under.

    transformers renames some weights while it loads a checkpoint (`embed_out` → `lm_head`) and fuses
    others (the experts of a mixture become one tensor). Its own reversal of that gives the names; as
    all but copies into contiguous memory are views, writing to a stored weight writes to the model.

    Raises:
        MergetuneError: a stored weight is no view: transformers computes with another form of it.
    """

    def __init__(self, model: Any) -> None:
        weights: dict[str, Tensor] = model.state_dict()
        self._views = stored_views(model, weights)
        owned = {weight.untyped_storage().data_ptr() for weight in weights.values()}
        copies = [n for n, view in self._views.items() if view.untyped_storage().data_ptr() not in owned]
        if copies:
            raise MergetuneError(
                f"transformers computes with another form of {shortened(copies)} than is stored, so the "
                "weights of this architecture cannot be swapped in a living model."
            )
        self._prefix = f"{model.base_model_prefix}."
        # Tensors that transformers leaves out when it loads, such as heads for multi-token prediction.
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        self._ignored = [re.compile(pattern) for pattern in ignored]

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight; the model's own prefix may be missing, as in GPT-2's `h.0.ln_1.weight`."""
        return self._views[name if name in self._views else self._prefix + name]

    def __iter__(self) -> Any:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def ignores(self, name: str) -> bool:
        """Say whether transformers leaves this tensor of a checkpoint out of the model."""
        return any(pattern.search(name) for pattern in self._ignored)
