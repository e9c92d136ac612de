"""The stack: plain data that says which layers of which models make one deeper or shallower model."""

from __future__ import annotations

from pydantic import Field, field_validator

from mergetune.files.yaml_io import Strict

_YAML = (".yaml", ".yml")


class Slot(Strict):
    """Layers that a model gives to a stack: `layers` holds the first one and the one after the last."""

    model: str
    layers: tuple[int, int]

    @field_validator("model")
    @classmethod
    def _is_no_stack(cls, model: str) -> str:
        if is_file(model):
            raise ValueError("must be a model's directory or hub id: name the layers of its own models")
        return model

    @field_validator("layers")
    @classmethod
    def _are_some(cls, layers: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= layers[0] < layers[1]:
            raise ValueError("must be the first layer and the one after the last, such as [0, 16]")
        return layers

    def __len__(self) -> int:
        """Return how many layers it gives."""
        return self.layers[1] - self.layers[0]

    def __str__(self) -> str:
        return f"{self.model}[{self.layers[0]}:{self.layers[1]}]"


class Stack(Strict):
    """The layers of one model or several, one slot on the other, as one model.

    `embeddings` names the model that gives what stands before the layers, by default the first slot's, `head`
    the one that gives what follows them (final norm and head), by default the last slot's, and `tokenizer`
    the one whose tokenizer, chat template and configuration it has, by default the first slot's.
    """

    stack: tuple[Slot, ...] = Field(min_length=1)
    embeddings: str | None = None
    head: str | None = None
    tokenizer: str | None = None

    @property
    def roles(self) -> dict[str, str]:
        """The models that give embeddings, head and tokenizer."""
        first, last = self.stack[0].model, self.stack[-1].model
        return {
            "embeddings": self.embeddings or first,
            "head": self.head or last,
            "tokenizer": self.tokenizer or first,
        }

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that it names, once."""
        return tuple(dict.fromkeys([*(slot.model for slot in self.stack), *self.roles.values()]))

    def renamed(self, names: dict[str, str]) -> Stack:
        """Return the same stack with other names of its models."""
        slots = tuple(slot.model_copy(update={"model": names[slot.model]}) for slot in self.stack)
        given = {role: getattr(self, role) for role in self.roles}
        return Stack(stack=slots, **{role: name and names[name] for role, name in given.items()})

    def __str__(self) -> str:
        return " + ".join(map(str, self.stack))


ModelReference = str | Stack  # a directory, a hub id, a stack's file; or a stack itself


def is_file(reference: str) -> bool:
    """Say whether a reference is a YAML file's, and so that of a stack."""
    return reference.endswith(_YAML)
