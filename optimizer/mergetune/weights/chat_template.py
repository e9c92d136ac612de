"""A chat template for a model that has none of its own: an expert's, or that of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from mergetune.errors import MergetuneError
from mergetune.weights.checkpoint import Expert
from mergetune.weights.tensor_files import read_json
from mergetune.weights.tokenizer_files import read_chat_template, read_eos_ids, read_special_token

_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template that takes the place of a tokenizer's own, and the tokens that end its messages.

    `text` is the template, or a mapping of named ones. The first of `ends` becomes the tokenizer's end of
    text; each of them ends a reply, as what ended one before does.
    """

    text: str | Mapping[str, str]
    ends: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, text: object, declared: Sequence[str | None] = ()) -> ChatTemplate:
        """Fit a template to the tokenizer in `folder`.

        What ends its messages are the tokens `declared`, and the first special token that it writes
        after a reply; those that the tokenizer lacks are left out.

        Raises:
            MergetuneError: the folder's tokenizer cannot be opened, or the text is no template.
        """
        if isinstance(text, list):  # files list named templates, tokenizers map them
            text = {each["name"]: each["template"] for each in text}
        assert isinstance(text, (str, dict))  # what `read_chat_template` finds
        tokenizer = open_tokenizer(folder)
        tokenizer.chat_template = text
        known = tokenizer.get_vocab()
        ends = dict.fromkeys(token for token in (*declared, _end_of_reply(tokenizer)) if token)
        return cls(text, tuple(token for token in ends if token in known))

    def put_into(self, tokenizer: Any) -> None:
        """Have a tokenizer from transformers use the template."""
        tokenizer.chat_template = self.text
        if self.ends:
            tokenizer.eos_token = self.ends[0]

    def files(self, folder: Path) -> dict[str, str]:
        """Return the files of a model directory that change where it is to use the template, by name."""
        config = _read(folder / "tokenizer_config.json")
        config.pop("chat_template", None)
        files = {"tokenizer_config.json": config}
        if self.ends:
            config["eos_token"] = self.ends[0]
            if (specials := _read(folder / "special_tokens_map.json")).get("eos_token"):
                files["special_tokens_map.json"] = specials | {"eos_token": self.ends[0]}
            ids = open_tokenizer(folder).convert_tokens_to_ids(list(self.ends))
            generation = _read(folder / "generation_config.json")
            all_ids = list(dict.fromkeys([*ids, *read_eos_ids(folder)]))
            files["generation_config.json"] = generation | {"eos_token_id": all_ids}
        if isinstance(self.text, str):
            return _as_json(files) | {_FILE: self.text}
        config["chat_template"] = [{"name": name, "template": text} for name, text in self.text.items()]
        return _as_json(files)


def choose_template(
    folder: Path, chat: bool | str, shared: ChatTemplate | None = None, template_owners: Sequence[str] = ()
) -> ChatTemplate | None:
    """Return the template that a model's conversations are written with; None where it is the model's own.

    Args:
        folder: the model, or the base of a merge.
        chat: a suite's `chat_template`: whether there are conversations, or the template's text.
        shared: what `shared_template` found.
        template_owners: whose that is, or between whom it has to be chosen.

    Raises:
        MergetuneError: there are conversations and no template, or several.
    """
    if isinstance(chat, str):
        return ChatTemplate.of(folder, chat)
    if not chat or shared is not None or read_chat_template(folder):
        return shared
    if template_owners:
        raise MergetuneError(
            f"{folder}: has no chat template, which the suite's conversations need (`chat_template: true`), "
            f"and the experts with one have different ones: {', '.join(template_owners)}. Choose one: name "
            f"its file in the suite, such as `chat_template: path/of/{template_owners[0]}/{_FILE}`."
        )
    raise MergetuneError(
        f"{folder}: has no chat template, which the suite's conversations need (`chat_template: true`). Name "
        "a file with one in the suite (`chat_template: FILE.jinja`, relative to the suite), or ask without "
        "conversations (`chat_template: false`)."
    )


def open_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a model directory; raises `MergetuneError` where it cannot be opened."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers raise at a broken file
        raise MergetuneError(
            f"{folder}: must hold a tokenizer that transformers opens, but: {error} Save the model's "
            "tokenizer there with `save_pretrained`."
        ) from error


def shared_template(base: Path, experts: Sequence[Expert]) -> tuple[ChatTemplate | None, tuple[str, ...]]:
    """Return the template that a base without one takes from its experts, and the experts that have one.

    There is none where the base has its own, no expert has one, or two experts have different ones.
    """
    if read_chat_template(base):
        return None, ()
    found = {expert.name: read_chat_template(expert.folder) for expert in experts}
    texts = {name: text for name, text in found.items() if text}
    if not texts or any(text != next(iter(texts.values())) for text in texts.values()):
        return None, tuple(texts)
    declared = [read_special_token(each.folder, "eos_token") for each in experts if each.name in texts]
    return ChatTemplate.of(base, next(iter(texts.values())), declared), tuple(texts)


def _end_of_reply(tokenizer: Any) -> str | None:
    """Return the first special token that a chat template writes after a reply."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise MergetuneError(f"The chat template cannot write a question and a reply: {error}") from error
    rest = tokenizer.encode(text.rpartition("reply")[2], add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    end = next((token for token in rest if token in special), None)
    return None if end is None else str(tokenizer.convert_ids_to_tokens(end))


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _as_json(files: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(data, indent=2, ensure_ascii=False) + "\n" for name, data in files.items()}
