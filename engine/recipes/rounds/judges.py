"""Judges: a server's model, a local model, a reward model, or a user's function.

A judge either compares two answers or gives each a score. Its replies are stored by the content of the texts, so that
asking again costs nothing; see `runs/kept`. Independent of the source of the answers.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.data.messages import Message
from dpoeng.engine.losses.own import as_own_loss
from dpoeng.engine.models.generate import generate
from dpoeng.engine.models.loading import load_model, pick_device, with_stored_quantization
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.reward import is_reward_model, load_reward_model
from dpoeng.engine.models.sources import ModelSource, find_model
from dpoeng.engine.recipes.compare import encode_prompt
from dpoeng.engine.reference.identity import reference_spec
from dpoeng.engine.runs.kept import Kept, content_key
from dpoeng.engine.runtime.endpoint import Endpoint, Refused
from dpoeng.engine.runtime.progress import QUIET, Progress

TEMPLATE = """\
Compare two answers to the same prompt. Decide which one serves the writer of the prompt better: it is correct, \
helpful and to the point. Neither the order of the answers nor their length counts.

[The prompt]
{prompt}
[The end of the prompt]

[Answer A]
{first}
[The end of answer A]

[Answer B]
{second}
[The end of answer B]

Give your reasons in one to three sentences. Then end with one line: "Verdict: A", "Verdict: B" or "Verdict: tie".
"""
"""The prompt for a model that compares; `--template` names a file with another text."""

Prompt = str | list[Message]
Question = tuple[Any, ...]
"""(prompt, answer) for a judge that scores, (prompt, first, second) for one that compares."""
Said = Mapping[str, Any]
"""`{"reply": text}`, `{"score": number}`, or `{"refused": why}` if there is neither."""

GIVE_UP_AFTER = 10
"""If this many first replies have no verdict, dpoeng stops asking: replies may cost money."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A judge.

    Attributes:
        name: its name in messages and records.
        identity: everything besides the question that its replies depend on, in JSON form.
        compares: whether it compares two answers; otherwise it scores one.
        ask: yields (place, reply) for some questions, as replies come.
        origin: its address, which does not count for stored replies; a note reports stored replies from another one.
    """

    name: str
    identity: Mapping[str, Any]
    compares: bool
    ask: Callable[[Sequence[Question]], Iterator[tuple[int, Said]]]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Settings of a judge; `server_model`, `key_variable` and the numbers are only for a server.

    Attributes:
        server_model: the model's name on the server; may be empty if it has only one.
        key_variable: the environment variable with the key.
        template: a text with {prompt}, {first} and {second}.
        max_tokens: maximum tokens of a reply.
        timeout_s, retries, concurrency: settings of the requests.
        device: device of a local model.
    """

    server_model: str = ""
    key_variable: str = "OPENAI_API_KEY"
    template: str = TEMPLATE
    max_tokens: int = 512
    timeout_s: float = 300.0
    retries: int = 6
    concurrency: int = 8
    device: str = "auto"


@dataclass(slots=True)
class Asked:
    """Number of new replies of a judge, of stored ones, and of stored ones from another origin."""

    new: int = 0
    kept: int = 0
    elsewhere: int = 0


def find_judge(judge: Any, settings: JudgeSettings, progress: Progress = QUIET) -> Judge:
    """Finds the judge that the user named.

    Args:
        judge: a server's address, `my_rule.py:score` or `my_module:score`, a function, or a model's folder or hub id.
        settings: its settings.
        progress: shows the hashing of a model's weights.

    Raises:
        UserError: there is no such judge, or the template lacks a part.
    """
    _check_template(settings.template)
    own = as_own_loss(str(judge) if isinstance(judge, Path) else judge)
    if isinstance(own, str) and own.startswith(("http://", "https://")):
        return _server(str(own), settings)
    if isinstance(own, str) and ":" not in own:
        return _model(str(own), settings, progress)
    return _rule(own)


_VERDICT = re.compile(r"verdict\W{0,12}(?:answer\W{1,4})?(a|b|tie)\b", re.IGNORECASE)


def parse_verdict(reply: str) -> str | None:
    """`first`, `second` or `tie`; None if the reply has no verdict, or several on its last line with one."""
    text = reply.rpartition("</think>")[2]
    found = [_VERDICT.findall(line) for line in text.split("\n")]
    last = {word.lower() for word in next((words for words in reversed(found) if words), [])}
    if not last:
        alone = re.fullmatch(r"\W*(?:answer\W+)?(a|b|tie)\W*", text, re.IGNORECASE)
        last = {alone[1].lower()} if alone else set()
    return {"a": "first", "b": "second", "tie": "tie"}[last.pop()] if len(last) == 1 else None


def shown_prompt(prompt: Prompt) -> str:
    """A prompt for a reader: a text unchanged, a single question without its role, a conversation turn by turn."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def is_reply(value: Any) -> bool:
    """Whether a stored value is a judge's reply or score."""
    return isinstance(value, dict) and (
        isinstance(value.get("reply"), str) or (_finite(value.get("score")) and not isinstance(value["score"], bool))
    )


def ask_all(judge: Judge, questions: Sequence[Question], kept: Kept, progress: Progress) -> tuple[list[Said], Asked]:
    """The judge's reply to each question, new or stored; equal questions are asked once.

    Raises:
        UserError: the judge is not reachable, or its first replies have no verdict.
    """
    keys = [content_key(dict(judge.identity), *question) for question in questions]
    distinct = dict(zip(reversed(keys), reversed(questions), strict=True))
    wanted = "reply" if judge.compares else "score"
    said = {key: known for key in distinct if wanted in (known := kept.get(key) or {})}
    asked = Asked(kept=len(said), elsewhere=sum(known.get("from", "") != judge.origin for known in said.values()))
    missing = [key for key in dict.fromkeys(keys) if key not in said]
    useless, first = 0, ""
    with progress.task(f"asking {judge.name}", len(distinct), "questions", len(said)) as advance:
        for place, words in judge.ask([distinct[key] for key in missing]) if missing else ():
            said[missing[place]] = words
            if "refused" not in words:  # refused questions are asked again next time
                kept.put(missing[place], {**words, **({"from": judge.origin} if judge.origin else {})})
            asked.new += 1
            useless += _is_useless(judge, words)
            first = first or str(words.get("refused") or words.get("reply") or "")
            if useless == asked.new == min(GIVE_UP_AFTER, len(missing)) and len(missing) > 1:
                raise _useless(judge, useless, first)
            advance(1, "")
    return [said[key] for key in keys], asked


def note_origin(asked: Asked, judge: Judge, progress: Progress) -> None:
    """Note that kept replies may be another model's."""
    if asked.elsewhere:
        progress.note(
            f"{asked.elsewhere} of the kept replies came from a model of this name at another address than "
            f"{judge.origin}; name another --output-dir if it is another model"
        )


def _is_useless(judge: Judge, words: Said) -> bool:
    return "refused" in words or (judge.compares and parse_verdict(words["reply"]) is None)


def _useless(judge: Judge, count: int, reply: str) -> UserError:
    return UserError(
        f"the judge's first {count} replies have no verdict",
        code="judge-verdicts",
        where=f"--judge {judge.name}",
        expected="a line such as `Verdict: A`, `Verdict: B` or `Verdict: tie`" if judge.compares else "a number",
        found=repr(reply[-300:]),
        remedy="use another judge, raise --judge-max-tokens, or change the prompt with --template",
    )


def _check_template(template: str) -> None:
    lacking = [name for name in ("{prompt}", "{first}", "{second}") if name not in template]
    if lacking:
        raise UserError(
            "the judge's template is incomplete",
            code="judge-template",
            where="--template",
            expected="a text with {prompt}, {first} and {second}",
            found=f"none of {', '.join(lacking)}",
            remedy="put them where prompt, answer A and answer B belong",
        )


def _filled(template: str, question: Question) -> str:
    """Fills in all three at once, because an answer may contain `{second}`."""
    prompt, first, second = question
    parts = {"prompt": shown_prompt(prompt), "first": first, "second": second}
    return re.sub(r"\{(prompt|first|second)\}", lambda match: parts[match[1]], template)


# --------------------------------------------------------------------------- kinds of judges


def _server(url: str, settings: JudgeSettings) -> Judge:
    endpoint = Endpoint.of(
        url,
        settings.key_variable,
        "--judge",
        timeout_s=settings.timeout_s,
        retries=settings.retries,
        concurrency=settings.concurrency,
    )
    model = settings.server_model or only_model(endpoint, "--judge-model")
    asks = {"model": model, "temperature": 0, "max_tokens": settings.max_tokens}

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Said]]:
        bodies = [
            {**asks, "messages": [{"role": "user", "content": _filled(settings.template, question)}]}
            for question in questions
        ]
        for place, answer in endpoint.post_all("/chat/completions", bodies):
            yield place, _reply(answer)

    identity = {"judge": "server", **asks, "template": settings.template}
    return Judge(f"{model} at {endpoint.url}", identity, True, ask, endpoint.url)


def only_model(endpoint: Endpoint, option: str) -> str:
    """The name of a server's only model; raises UserError if it has none or several."""
    found = endpoint.models()
    if len(found) != 1:
        raise UserError(
            "which of the server's models is meant?" if found else "the server names no model",
            code="endpoint-model",
            where=endpoint.url,
            expected=f"{option} NAME",
            found=", ".join(found[:20]) or "no names",
            remedy=f"name one with {option}",
        )
    return found[0]


def _reply(answer: Any) -> Said:
    if isinstance(answer, Refused):
        return {"refused": answer.why}
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return {"refused": f"an answer without a message: {str(answer)[:200]}"}
    return {"reply": str(text or "")}


def _model(name: str, settings: JudgeSettings, progress: Progress) -> Judge:
    """A reward model or a causal one, by its config.json; loaded at the first question."""
    try:
        source = find_model(name)
    except UserError as error:
        error.where = f"--judge {name}"
        raise
    device = pick_device(settings.device)
    plain = PrecomputeConfig.model_validate({"model": name, "device": settings.device})
    config = with_stored_quantization(plain, source)
    weights = {"weights": reference_spec(config, source, None, progress).digest}
    if is_reward_model(source):

        def scores(questions: Sequence[Question]) -> Iterator[tuple[int, Said]]:
            model = load_reward_model(source, device)
            for place, (prompt, answer) in enumerate(questions):
                score = model.score(prompt, answer)
                yield place, {"score": score} if _finite(score) else {"refused": f"no reward: {score}"}

        return Judge(name, {"judge": "reward", **weights}, False, scores)

    def replies(questions: Sequence[Question]) -> Iterator[tuple[int, Said]]:
        lm = _load(source, config, settings.device)
        chat = bool(getattr(lm.tokenizer, "chat_template", None))
        for place, question in enumerate(questions):
            ids = encode_prompt(lm.tokenizer, _filled(settings.template, question), chat=chat, prompt_format=None)
            yield place, {"reply": generate(lm, [np.asarray(ids)], max_new_tokens=settings.max_tokens)[0]}

    identity = {"judge": "model", **weights, "template": settings.template, "max_tokens": settings.max_tokens}
    return Judge(name, identity, True, replies)


def _load(source: ModelSource, config: PrecomputeConfig, device: str) -> CausalLM:
    return load_model(
        source,
        quantization=config.quantization,
        dtype=config.dtype,
        device=pick_device(device),
        quant_type=config.bnb_4bit_quant_type,
        double_quant=config.bnb_4bit_use_double_quant,
    )


def _rule(own: Any) -> Judge:
    """A user's function: (prompt, answer) -> a number, larger for a better answer."""
    name = str(own)
    try:
        function: Callable[[str, str], Any] = own.function
        digest = own.digest
    except UserError as error:
        raise UserError(
            "cannot find the judge",
            code="judge-rule",
            where=f"--judge {name}",
            expected="my_rule.py:score or my_module:score, a function of a prompt and an answer",
            found=error.found,
            remedy="correct the name or the code; paths are relative to the folder in which the command runs",
        ) from error

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Said]]:
        for place, (prompt, answer) in enumerate(questions):
            try:
                score = function(shown_prompt(prompt), answer)
            except Exception as error:
                raise _failed(name, error, answer) from error
            yield place, {"score": float(score)} if _finite(score) else {"refused": f"the rule returned {score!r}"}

    return Judge(name, {"judge": "rule", "code": digest}, False, ask)


def _finite(score: Any) -> bool:
    try:
        return isinstance(score, int | float) and math.isfinite(score)
    except OverflowError:  # a whole number beyond floats
        return False


def _failed(name: str, error: Exception, answer: str) -> UserError:
    at = traceback.extract_tb(error.__traceback__)[-1]
    return UserError(
        "your function failed on an answer",
        code="judge-rule",
        where=f"--judge {name}, {Path(at.filename).name}:{at.lineno}",
        expected="a number for every answer, or None for one that it cannot judge",
        found=f"{type(error).__name__}: {error}; the answer began {answer[:80]!r}",
        remedy="correct the function, then run the same command again: its scores so far are stored",
    )
