"""The models that go into a merge, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mergetune.errors import MergetuneError
from mergetune.files.scratch import scratch_folder
from mergetune.files.yaml_io import Strict
from mergetune.merging.merger import Merger
from mergetune.space.recipe import MergeRecipe, Source
from mergetune.weights.adapter import open_expert
from mergetune.weights.chat_template import ChatTemplate, choose_template, shared_template
from mergetune.weights.checkpoint import Checkpoint, Expert
from mergetune.weights.compatibility import (
    base_norm,
    check_compatibility,
    check_task_vectors,
    task_vector_norms,
)
from mergetune.weights.extended_base import extend_base, settled_tokens
from mergetune.weights.models import find_model, reference_to
from mergetune.weights.tokenizer_files import VocabularyRule
from mergetune.weights.vocabulary import match_tokens


class ModelPaths(Strict):
    """Where the models of a merge are, as plain data: another process can open them, too.

    `extended_base` is the base with the tokens that experts added, where they added any.
    """

    base: Path
    experts: dict[str, Path]
    vocabulary: VocabularyRule = "refuse"
    extended_base: Path | None = None

    def open(self, chat: ChatTemplate | None = None) -> Inputs:
        """Open models that `open_inputs` checked before, to merge them; `chat` is that of the inputs."""
        base = given = Checkpoint(self.base)
        if self.extended_base is not None:
            base = Checkpoint(self.extended_base)
        opened = [open_expert(name, path, given) for name, path in self.experts.items()]
        experts, of = _in_rows(opened, base), self.base if self.extended_base else None
        return Inputs(base, experts, {}, (), vocabulary=self.vocabulary, given=of, chat=chat)


@dataclass(frozen=True)
class Inputs:
    """A base and its experts, fit to be merged; `warnings` holds what is only suspicious.

    `given` is the base that was given where `base` is that one with the tokens that experts added. `chat`
    takes the place of the base's chat template; `template_owners` are the experts that have one where the
    base has none.
    """

    base: Checkpoint
    experts: tuple[Expert, ...]
    norms: Mapping[str, float]
    warnings: tuple[str, ...]
    vocabulary: VocabularyRule = "refuse"
    given: Path | None = None
    chat: ChatTemplate | None = None
    template_owners: tuple[str, ...] = ()

    @cached_property
    def merger(self) -> Merger:
        """What merges these models; it keeps what does not depend on the coefficients."""
        return Merger(self.base, self.experts)

    @property
    def paths(self) -> ModelPaths:
        """Where the models are."""
        return ModelPaths(
            base=self.given or self.base.folder,
            experts={expert.name: expert.folder for expert in self.experts},
            vocabulary=self.vocabulary,
            extended_base=self.base.folder if self.given else None,
        )

    @property
    def base_source(self) -> Source:
        """The base, as recipes name it."""
        return Source(path=reference_to(self.base.folder), digest=self.base.digest)

    @property
    def expert_sources(self) -> dict[str, Source]:
        """The experts, as recipes name them."""
        return {
            expert.name: Source(path=reference_to(expert.folder), digest=expert.digest)
            for expert in self.experts
        }

    def read_digests(self) -> None:
        """Read all models side by side, once for their digests; else each is read when it is first named."""
        with ThreadPoolExecutor() as readers:
            list(readers.map(lambda model: model.digest, (self.base, *self.experts)))

    def named_in(self, recipe: MergeRecipe) -> MergeRecipe:
        """Return a recipe of these models that names them so that it can stand in any folder."""
        sources = self.expert_sources
        experts = {name: sources[name] for name in recipe.experts}
        return recipe.model_copy(update={"base": self.base_source, "experts": experts})

    def with_chat(self, chat: bool | str) -> Inputs:
        """Return the same models with the chat template of a suite: see `choose_template`.

        Raises:
            MergetuneError: there are to be conversations and there is no template, or several.
        """
        return replace(self, chat=choose_template(self.base.folder, chat, self.chat, self.template_owners))

    @property
    def changed(self) -> dict[str, tuple[str, ...]]:
        """The tensors that each expert changes."""
        return {expert.name: expert.targets for expert in self.experts}


def open_inputs(
    base: Path,
    experts: Mapping[str, Path],
    vocabulary: VocabularyRule = "refuse",
    extended_base: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Inputs:
    """Open base and experts and check that they can be merged.

    Args:
        base: the base's directory.
        experts: the experts' directories by name.
        vocabulary: what becomes of tokens that experts added; see `StudyConfig`.
        extended_base: where a base with more tokens is written, if there is none yet, and read from; by
            default a folder that goes with this process.
        say: is told what is done, for large models take minutes.

    Raises:
        MergetuneError: a file is missing or broken, the models do not fit together, or weights are
            NaN or infinite; the message names every mismatch.
    """
    say("opening the models")
    given = checkpoint = Checkpoint(base)
    opened = tuple(open_expert(name, path, given) for name, path in experts.items())
    warnings = check_compatibility(given, opened, vocabulary)
    if vocabulary == "mean":
        checkpoint = extend_base(given, opened, extended_base or scratch_folder() / "base")
    opened = _in_rows(opened, checkpoint)
    norms = task_vector_norms(checkpoint, opened, say)
    warnings += check_task_vectors(norms, base_norm(checkpoint))
    chat, template_owners = shared_template(checkpoint.folder, opened)
    warnings += _warn_of_template(chat, template_owners, len(opened))
    is_extended = checkpoint is not given
    return Inputs(
        checkpoint,
        opened,
        norms,
        tuple(warnings),
        vocabulary,
        base if is_extended else None,
        chat,
        template_owners,
    )


def open_recipe(file: Path, say: Callable[[str], object] = lambda _: None) -> tuple[MergeRecipe, Inputs]:
    """Read a recipe file, whose relative paths are taken from its folder, and open its models.

    `say` is told what is done.

    Raises:
        MergetuneError: an input is missing, or its weights are not those that the recipe names.
    """
    recipe, folder = MergeRecipe.read(file), file.resolve().parent
    experts = {name: find_model(source.path, folder) for name, source in recipe.experts.items()}
    # The digests tell which rows were matched by token, too; without them added tokens are refused.
    are_pinned = all(source.digest for source in (recipe.base, *recipe.experts.values()))
    rule: VocabularyRule = "base" if are_pinned else "refuse"
    inputs = open_inputs(find_model(recipe.base.path, folder), experts, rule, say=say)
    found = {"base": inputs.base_source, **inputs.expert_sources}
    for name, source in {"base": recipe.base, **recipe.experts}.items():
        if source.digest is not None and source.digest != found[name].digest:
            raise MergetuneError(
                f"{file}: the weights of `{name}` in {found[name].path} are not those that the "
                f"recipe was made with (SHA-256 {found[name].digest}, not {source.digest}). Give the "
                "same weights, or take the digest out of the recipe to merge these."
            )
    return recipe, inputs


def _in_rows(experts: Iterable[Expert], base: Checkpoint) -> tuple[Expert, ...]:
    """Return the experts with embeddings and head in the base's rows, where they have others."""
    settled = settled_tokens(base.folder)
    return tuple(match_tokens(expert, base, settled) for expert in experts)


def _warn_of_template(chat: ChatTemplate | None, template_owners: Sequence[str], n_experts: int) -> list[str]:
    """Say what becomes of the experts' chat templates where the base has none."""
    names = " and ".join(f"`{name}`" for name in template_owners)
    if not template_owners:
        return []
    is_shared = len(template_owners) == n_experts
    others = "" if is_shared else " Check that the other experts were trained with them, too."
    if chat is None:
        return [
            f"The base has no chat template, and those of {names} differ: the merged model has none, unless "
            "the suite names a file with one (`chat_template: FILE.jinja`)."
        ]
    if not chat.ends:
        return [
            f"The base has no chat template: the merged model takes that of {names}, but the base's "
            "tokenizer lacks the token that ends its messages. Take it over with `vocabulary: mean`."
        ]
    return [
        f"The base has no chat template: the merged model takes that of {names}, and the token that "
        f"ends its messages.{others}"
    ]
