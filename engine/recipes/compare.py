"""Compares answers to held-out prompts before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import IdArray, as_ids
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.data.encoding import encode_response
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.models.generate import generate
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.recipes.evaluate import Trained, before_and_after
from dpoeng.engine.recipes.inputs import open_views, split
from dpoeng.engine.runs.folder import write_samples
from dpoeng.engine.runtime.progress import QUIET, Progress


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt as text, and the model's continuations before and after training."""

    prompt: str
    before: str
    after: str


def compare_generations(
    trained: Trained,
    config: TrainConfig,
    view: AnyView,
    prompts_of: Callable[[Any], Sequence[IdArray]],
    *,
    special: bool = False,
    **settings: Any,
) -> list[Generation]:
    """Continues prompts with the policy before training and after it.

    Args:
        trained: see `find_trained`.
        config: config of its run; reads cache, view and precision.
        view: a view of the cache.
        prompts_of: tokenizer -> token ids, [P] each.
        special: whether to show the prompts' special tokens.
        settings: settings of `generate`, the same for both.

    Raises:
        UserError: the model is not available, or a prompt cannot be encoded.
    """

    prompts: list[IdArray] = []

    def before(lm: CausalLM) -> list[str]:
        prompts.extend(prompts_of(lm.tokenizer))
        return generate(lm, prompts, **settings)

    def after(lm: CausalLM) -> tuple[list[str], list[str]]:
        texts = lm.tokenizer.batch_decode([ids.tolist() for ids in prompts], skip_special_tokens=not special)
        return texts, generate(lm, prompts, **settings)

    old, (texts, new) = before_and_after(trained, config, view, before, after, tokenizer=True)
    return [Generation(*one) for one in zip(texts, old, new, strict=True)]


def compare_prompts(
    trained: Trained,
    config: TrainConfig,
    prompts: Sequence[str],
    *,
    count: int = 4,
    chat: bool | None = None,
    **settings: Any,
) -> list[Generation]:
    """Continues texts, or prompts that the run held out, before and after training.

    Args:
        trained: see `find_trained`.
        config: config of its run; reads cache, view and precision.
        prompts: texts; if empty, prompts that the run held out, with exactly their token ids.
        count: number of held-out prompts.
        chat: whether texts are a user's messages for the chat template. None: if there is a template, and phase one did
            not use prompt_format.
        settings: settings of `generate`, the same for both.

    Raises:
        UserError: the cache or the model is not available, or a prompt cannot be encoded.
    """
    view, eval_view = open_views(config)

    def prompts_of(tokenizer: Any) -> list[IdArray]:
        if not prompts:
            return held_out_prompts(view, eval_view, config, count)
        wrapped = view.meta.get("prompt_format")
        templated = as_chat(tokenizer, wrapped) if chat is None else chat
        return [encode_prompt(tokenizer, text, chat=templated, prompt_format=wrapped) for text in prompts]

    answers = compare_generations(trained, config, view, prompts_of, **settings)
    if prompts:  # show texts as given, without the template
        answers = [replace(one, prompt=text) for one, text in zip(answers, prompts, strict=True)]
    return answers


def held_out_prompts(view: AnyView, eval_view: View | None, config: TrainConfig, count: int) -> list[IdArray]:
    """The first `count` distinct prompts that a run held out, or of the view if it held out none."""
    chosen_view, rows, _ = held_out_rows(view, eval_view, config, count)
    return [chosen_view[row].ids.prompt_ids for row in rows]


def held_out_rows(
    view: AnyView, eval_view: View | None, config: TrainConfig, count: int | None
) -> tuple[AnyView, list[int], bool]:
    """A view, its first rows with `count` distinct prompts (None: all), and whether the run held them out."""
    held_out = split(view, eval_view, config)[1]
    chosen_view = (eval_view or view) if held_out else view
    first: dict[bytes, int] = {}
    for row in held_out or view.row_starts():
        if len(first) == count:
            break
        first.setdefault(chosen_view[row].ids.prompt_ids.tobytes(), row)
    return chosen_view, list(first.values()), bool(held_out)


def keep_samples(trained: Trained, generations: Sequence[Generation], progress: Progress = QUIET) -> None:
    """Saves answers as samples.jsonl in the run's folder, where `dpoeng report` finds them, with a note.

    Does nothing for an adapter or checkpoint outside a run's folder. A folder that is not writable causes a note, not
    an error: the answers have been shown already.
    """
    if trained.run is None:
        return
    try:
        path = write_samples(trained.folder.parent, [asdict(generation) for generation in generations])
    except UserError as error:
        progress.note(f"`dpoeng report` will not show these answers: {error.message} ({error.where}: {error.found})")
    else:
        progress.note(f"{path} contains these answers; `dpoeng report` shows them")


def as_chat(tokenizer: Any, prompt_format: str | None) -> bool:
    """Whether texts are user messages by default: if there is a chat template and no format around prompts."""
    return bool(getattr(tokenizer, "chat_template", None)) and not prompt_format


def encode_prompt(tokenizer: Any, text: str, *, chat: bool, prompt_format: str | None) -> IdArray:
    """Tokenises a prompt as phase one would: a user's message for the chat template, or a text.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if chat:
        turn = [{"role": "assistant", "content": "."}]
        pair = PreferencePair([{"role": "user", "content": text}], turn, turn)
    else:
        pair = PreferencePair((prompt_format or "{prompt}").replace("{prompt}", text), ".", ".")
    encoded = encode_response(pair, tokenizer)
    return as_ids(encoded.ids[: encoded.start])
