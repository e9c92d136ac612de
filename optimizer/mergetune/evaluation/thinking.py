"""Thoughts: what a model writes before its reply, and how that is taken off."""

from __future__ import annotations

# What ends the thoughts of known families: Qwen, DeepSeek and most others; Mistral; Cohere; gpt-oss, as its
# tokens and as what is left of these where special tokens are not written.
_ENDS = (
    "</think>",
    "[/THINK]",
    "<|END_THINKING|>",
    "<|channel|>final<|message|>",
    "assistantfinal",
    "</thinking>",
    "</seed:think>",
    "◁/think▷",
)
_BEGINS = (
    "<think>",
    "[THINK]",
    "<|START_THINKING|>",
    "<|channel|>analysis",
    "<thinking>",
    "<seed:think>",
    "◁think▷",
)


def without_thoughts(reply: str, end: str | None = None) -> str:
    """Return what a model says after its thoughts.

    A reply that begins to think and comes to no end says nothing; one without thoughts stays as it is.

    Args:
        reply: as the model wrote it.
        end: what ends the thoughts; None: the markers of known families.
    """
    ends = _ENDS if end is None else (end,)
    place, marker = max((reply.rfind(each), each) for each in ends)
    if place >= 0:
        return reply[place + len(marker) :].lstrip()
    is_thinking = end is None and reply.lstrip().startswith(_BEGINS)
    return "" if is_thinking else reply


def ending_of_thoughts(prompt: str) -> str:
    """Return what ends the thoughts that a prompt begins, as Qwen, DeepSeek and most others write them."""
    return "\n</think>\n\n" if prompt.rstrip().endswith("<think>") else ""
