"""A tokenizer's chat template as a function: messages to text, and the parts that it marks as the assistant's.

transformers renders the template, except that it never sees today's date. Independent of pairs.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.messages import Message
from dpoeng.engine.data.strict_json import RowFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates print today's date, so pairs would differ from day to day. This is the default date of Llama's own
# templates. `chat_template_kwargs` may set `date_string` if the template reads it.
PINNED_DATE = datetime.date(2024, 7, 26)

# Limits for a pair: real templates take milliseconds, and write about as much as they read.
MAX_SECONDS: Final = 10.0
MAX_BYTES: Final = 2 << 30
MAX_TEXT: Final = 64 << 20

Spans = tuple[tuple[int, int], ...]

_GENERATION = re.compile(
    r"(?P<line>^[ \t]*)?\{%(?P<before>[-+]?)\s*(?P<end>end)?generation\s*(?P<behind>[-+]?)%\}", re.MULTILINE
)
_OPEN, _CLOSE = "\ue000dpoeng\ue001", "\ue001dpoeng\ue000"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A template's output.

    Attributes:
        text: the whole output.
        marked: [begin, end) of the `{% generation %}` blocks, in characters.
    """

    text: str
    marked: Spans = ()


@dataclass(frozen=True, slots=True)
class Renderer:
    """A template with all its inputs except the messages.

    Attributes:
        tokenizer: renders the template.
        template: its source.
        tools: JSON schemas, or None.
        arguments: the `chat_template_kwargs`.
        marks: whether the template marks the assistant's parts.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    marks: bool = False

    def __call__(self, messages: Sequence[Message], *, opened: bool = False, tools: list[Any] | None = None) -> str:
        """The text of a conversation; with `opened`, followed by the template's opening for an answer.

        Raises:
            RowFault: `template-error`, the template refuses the messages.
        """
        return self._render(self.template, messages, opened, tools if tools is not None else self.tools)

    def with_marks(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation, and the parts that the template marks.

        Raises:
            RowFault: `template-error`; `template-turns`, the marks cannot be read.
        """
        text = self._render(self.template, messages, False, self.tools)
        if not self.marks:
            return Rendered(text)
        pieces = re.split(
            f"({_OPEN}|{_CLOSE})", self._render(_with_visible_marks(self.template), messages, False, self.tools)
        )
        marked, at, begin = [], 0, None
        for piece in pieces:
            if piece == _OPEN:
                begin = at
            elif piece == _CLOSE and begin is not None:
                marked.append((begin, at))
                begin = None
            else:
                at += len(piece)
        if "".join(piece for piece in pieces if piece not in (_OPEN, _CLOSE)) != text:
            raise RowFault("template-turns", "the chat template's generation marks change its output")
        return Rendered(text, tuple(marked))

    def _render(self, template: str, messages: Sequence[Message], opened: bool, tools: list[Any] | None) -> str:
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    chat_template=template,
                    add_generation_prompt=opened,
                    tokenize=False,
                    **self.arguments,
                )
            )
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # a template is a program: it may raise anything about its messages
            raise RowFault("template-error", f"{type(error).__name__}: {error}"[:300]) from None
        if len(text) > MAX_TEXT:
            raise MemoryError
        return text


class _TooLong(BaseException):
    """Raised inside a template; derives from BaseException so that no handler in it catches it."""


_ONE_AT_A_TIME: Final = threading.RLock()
"""The memory limit is the whole process's: each of two threads would restore the other's limit."""


@contextmanager
def within_limits(where: str) -> Iterator[None]:
    """Limits templates to `MAX_SECONDS` of this thread's CPU time and `MAX_BYTES` of memory.

    A template is a program. A separate process could be stopped from outside, but it would have to import transformers,
    which takes longer than all templates of most runs, or be a fork, which threads rule out. Templates are Python,
    which a signal can stop at any step, and the system can refuse it memory in this process, too. So they run here, for
    some microseconds a pair. Only the main thread receives signals; a thread watches the templates of the others.

    Args:
        where: name of the pair, for the message.

    Raises:
        UserError: a limit was reached.
    """
    try:
        with _ONE_AT_A_TIME, _limited_time(), _limited_memory():
            yield
    except _TooLong:
        raise _runaway(where, f"still at work after {MAX_SECONDS:g} s") from None
    except MemoryError:
        raise _runaway(where, "more memory, or a longer text") from None


@contextmanager
def _limited_time() -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        with _WATCH.limited():
            yield
        return

    def stop(*_: object) -> None:
        raise _TooLong

    handler = signal.signal(signal.SIGVTALRM, stop)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler)


class _Watch:
    """Ends work in other threads than the main one. Its own thread begins with the first such work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: _Work | None = None
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Raises `_TooLong` in this thread once the block has taken `MAX_SECONDS` of it."""
        work, outer = _Work(), self._work
        with self._lock:
            self._work = work
            if self._thread is None or not self._thread.is_alive():  # a process that was forked has none
                self._thread = threading.Thread(target=self._look, name="dpoeng-templates", daemon=True)
                self._thread.start()
        self._wake.set()
        try:
            yield
        finally:
            with self._lock:  # from now on nothing is raised; a pending exception is withdrawn
                self._work = outer
                _raise_in(work.thread, None)

    def _look(self) -> None:
        while self._wake.wait():
            time.sleep(min(0.25, MAX_SECONDS / 4))
            with self._lock:
                if self._work is None:
                    self._wake.clear()
                elif not self._work.ended and self._work.seconds() > MAX_SECONDS:
                    self._work.ended = True  # once: a second exception could arrive after the block
                    _raise_in(self._work.thread, _TooLong)


class _Work:
    """The work of one thread."""

    def __init__(self) -> None:
        self.thread, self.ended = threading.get_ident(), False
        clock_of = getattr(time, "pthread_getcpuclockid", None)  # macOS has none: there it is time on the wall
        self._now: Callable[[], float] = time.monotonic
        if clock_of is not None:
            self._now = functools.partial(time.clock_gettime, clock_of(self.thread))
        self._began = self._now()

    def seconds(self) -> float:
        return self._now() - self._began


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Lets a thread meet an exception at its next step in Python; None takes back one that it has not met yet."""
    what = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


_WATCH: Final = _Watch()


@contextmanager
def _limited_memory() -> Iterator[None]:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(pages.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
    if soft != resource.RLIM_INFINITY and most >= soft:
        yield  # this process already has a lower limit
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _runaway(where: str, found: str) -> UserError:
    return UserError(
        "the chat template does not end, or its output is too large",
        code="tokenizer-template-limits",
        where=where,
        expected=f"one pair within {MAX_SECONDS:g} s, {MAX_BYTES >> 30} GiB and {MAX_TEXT >> 20} million characters",
        found=found,
        remedy="take the template of the SFT model from a source that you trust, or name another with --tokenizer",
        exit_status=3,
    )


def make_renderer(
    tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, arguments: Mapping[str, Any] | None
) -> Renderer:
    """The tokenizer's template, with these tools and arguments.

    Raises:
        ValueError: the tokenizer has no template.
    """
    try:
        template = str(tokenizer.get_chat_template(tools=tools))
    except AttributeError:
        raise ValueError("no chat template") from None
    marks = _GENERATION.search(template) is not None
    return Renderer(tokenizer, _without_clock(template), tools, arguments or {}, marks)


@functools.lru_cache(maxsize=64)
def _with_visible_marks(template: str) -> str:
    """The template with private-use characters at the beginnings and ends of its `{% generation %}` blocks.

    `with` has its own scope, like `generation`. White space around the tags is handled as Jinja handles it for the
    original tags (`-`, and the settings trim_blocks and lstrip_blocks).
    """

    def visible(match: re.Match[str]) -> str:
        space = "" if match["before"] != "+" else match["line"] or ""
        before, behind = match["before"].strip("+"), match["behind"]
        mark, tag = (_CLOSE, "endwith") if match["end"] else (_OPEN, "with")
        return f"{space}{{{{{before} '{mark}' }}}}{{% {tag} {behind}%}}"

    return _GENERATION.sub(visible, template)


@functools.lru_cache(maxsize=64)
def names_read(template: str) -> frozenset[str]:
    """Every variable that a template reads anywhere."""
    import jinja2
    from jinja2 import nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    source = _with_visible_marks(template)
    try:
        return frozenset(node.name for node in environment.parse(source).find_all(nodes.Name))
    except (jinja2.TemplateError, RecursionError) as error:
        raise RowFault("template-error", f"{type(error).__name__}: {error}"[:300]) from None


_DIRECTIVES = "aAbBdeHIjmMpSyY"


@functools.lru_cache(maxsize=64)
def _without_clock(template: str) -> str:
    """Prepends a macro that replaces transformers' clock, for each way of passing the format.

    `trim_blocks` removes the line break after the macro, so that the template's output begins as before.
    """
    if "strftime_now" not in template:
        return template
    steps = "".join(
        f"|replace('%{flag}{letter}', '{PINNED_DATE.strftime(f'%{flag}{letter}')}')"
        for flag in ("", "-")
        for letter in _DIRECTIVES
        if "'" not in PINNED_DATE.strftime(f"%{flag}{letter}")
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{template}"
