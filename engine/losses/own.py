"""Losses that users write: found by name, and known again by what they compute. Imports no torch."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import sysconfig
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpoeng.cache.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """What a loss of your own gets: B pairs, all log-probs in nats, float64, on the device of the policy.

    Token by token, the arrays are padded with 0 behind a response's end, so that a sum over the last axis is the
    response's. A mean is that sum divided by `chosen_tokens`.

    Attributes:
        chosen_logps: [B] log pi of the chosen responses, with gradient; so is `rejected_logps`.
        ref_chosen_logps: [B] the same under the reference, without gradient; so is `ref_rejected_logps`.
        chosen_token_logps: [B, C] log pi of each token, with gradient; rejected [B, R].
        ref_chosen_token_logps: [B, C] the same under the reference; rejected [B, R]. NaN where the cache was imported
            as sums over whole responses.
        chosen_mask: [B, C] bool, true where a response has a token; rejected [B, R].
        chosen_tokens: [B] number of tokens; so is `rejected_tokens`.
        beta: the setting.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_token_logps: Tensor
    rejected_token_logps: Tensor
    ref_chosen_token_logps: Tensor
    ref_rejected_token_logps: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float


class OwnLoss(str):
    """The name of a user's loss, `module:function` or `file.py:function`, which stands in `loss_type` as others do.

    It is text, so that configs, records and messages hold it as they hold any name. The function behind it is looked
    for at its first use: to read a config runs no code of anybody's.
    """

    __slots__ = ("_found", "_recorded")
    _found: Callable[[LossInputs], Tensor] | None
    _recorded: bool

    def __new__(
        cls, name: str, function: Callable[[LossInputs], Tensor] | None = None, *, recorded: bool = False
    ) -> OwnLoss:
        """A loss by its name.

        Args:
            name: of the loss.
            function: where it was handed over in Python and need not be looked for.
            recorded: whether a file of a run names it, and no user: its code is then not run.
        """
        own = super().__new__(cls, name)
        own._found, own._recorded = function, recorded
        return own

    @property
    def function(self) -> Callable[[LossInputs], Tensor]:
        """The function; raises UserError where it is not found, or was named by a run's record alone."""
        if self._recorded:
            raise UserError(
                "the run was trained with a loss of its maker's, whose code a record does not start",
                code="loss-own-missing",
                where=f"run.json, loss_type {self}",
                expected="the loss, named by you",
                found="its name in a file alone",
                remedy=f"look at the code, then add --loss-type {self}",
            )
        if self._found is None:
            self._found = find_function(self)
        return self._found

    @property
    def digest(self) -> str:
        """Of what the function computes, see `code_digest`."""
        return code_digest(self.function, str(self))


def as_own_loss(value: Any) -> Any:
    """`value` as an OwnLoss where it names or is a function of the user's, else as it came."""
    if isinstance(value, OwnLoss):
        return value
    if isinstance(value, str) and ":" in value:
        return OwnLoss(value.strip())
    if callable(value) and not isinstance(value, type):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return OwnLoss(f"{getattr(value, '__module__', None) or '__main__'}:{name}", value)
    return value


def find_function(name: str) -> Callable[[LossInputs], Tensor]:
    """Imports the module, or runs the file, that `name` begins with, and returns its function.

    Raises:
        UserError: there is none, or its code fails.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _run_file(Path(place)) if place.endswith(".py") else _import(place)
    except UserError:
        raise
    except Exception as error:
        raise _missing(name, f"{type(error).__name__}: {error}", "the code around your loss cannot be run") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        there = f"functions there: {', '.join(functions) or 'none'}"
        raise _missing(name, f"no function {attribute} in {place}; {there}", "your loss is not there")
    return found  # type: ignore[no-any-return]


def _missing(name: str, found: str, message: str) -> UserError:
    return UserError(
        message,
        code="loss-own-missing",
        where=f"--loss-type {name}",
        expected="my_loss.py:my_loss (a file and a function in it) or my_module:my_loss (a module that can be "
        "imported), written in a file",
        found=found,
        remedy="correct the name or the code; paths are taken from the folder in which the command runs",
    )


def _run_file(path: Path) -> types.ModuleType:
    """A module of a file, made without leaving bytecode beside it, which could be older than the text."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _missing(str(path), error.strerror or str(error), "the file with your loss cannot be read") from error
    module = types.ModuleType(path.stem)
    module.__file__ = str(path.resolve())
    # Under the path, as no import statement can name it: dataclasses in the file look for their module there.
    module.__name__ = module.__file__
    sys.modules[module.__name__] = module
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module


def _import(name: str) -> types.ModuleType:
    """A module, looked for in the current folder too, where a console script does not look."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


# --------------------------------------------------------------------------- the same loss again


def code_digest(function: Callable[..., Any], name: str) -> str:
    """A hash of what a function computes: its code, what it closes over, and what it names outside itself.

    Functions and classes of the user's that it uses count, in whatever module, and so do plain values. Comments and
    the layout of lines do not; nor do libraries, which the run records by version.

    Raises:
        UserError: there is no source to read.
    """
    digest = hashlib.sha256()
    try:
        for part in _parts(function, set()):
            digest.update(part.encode() + b"\0")
    except (OSError, TypeError) as error:
        raise _missing(name, f"no source: {error}", "your loss cannot be known again after an interruption") from error
    return digest.hexdigest()[:32]


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    """What makes a function or a value, as texts in a fixed order."""
    if id(value) in seen:
        return
    seen.add(id(value))
    value = inspect.unwrap(value) if inspect.isfunction(value) else value
    if inspect.isfunction(value):
        yield _code(value)
        names = sorted(_names(value.__code__))
        yield from _used(names, value.__globals__, seen)
        closed = inspect.getclosurevars(value).nonlocals
        defaults = [*enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
        for key, held in [*sorted(closed.items()), *defaults]:
            yield str(key)
            yield from _parts(held, seen)
    elif inspect.isclass(value):
        yield _code(value)
        for method in vars(value).values():
            if inspect.isfunction(method):
                yield from _used(sorted(_names(method.__code__)), method.__globals__, seen)
    elif inspect.ismethod(value):
        yield from _parts(value.__func__, seen)
        yield from _parts(value.__self__, seen)
    elif hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        yield from _parts(value.func, seen)
        yield repr((value.args, sorted(value.keywords.items())))
    elif isinstance(value, set | frozenset) and _is_plain(list(value)):
        yield repr(sorted(map(repr, value)))  # their own order changes from process to process
    elif _is_plain(value):
        yield repr(value)
    elif hasattr(value, "__dict__") and _is_users(type(value)):  # an object that is called as a function
        yield from _parts(type(value), seen)
        for key, held in sorted(vars(value).items()):
            yield key
            yield from _parts(held, seen)
    else:  # an object of a library, such as a tensor: as it shows itself
        yield f"{type(value).__qualname__} {value!r}" if not _has_address(value) else type(value).__qualname__


def _used(names: list[str], place: dict[str, Any], seen: set[int]) -> Iterator[str]:
    """What of `names` is the user's own: in the module itself, or in modules of the user's that are named too."""
    modules = [place[name] for name in names if isinstance(place.get(name), types.ModuleType)]
    for name in names:
        for holder in (place, *(vars(module) for module in modules if _is_users(module))):
            value = holder.get(name)
            if name in holder and (_is_plain(value) or (callable(value) and _is_users(value))):
                yield name
                yield from _parts(value, seen)


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return {*code.co_names}.union(*(_names(each) for each in inner))


def _code(value: Any) -> str:
    """The source without comments and layout; a lambda inside a call is kept as its lines are."""
    text = textwrap.dedent(inspect.getsource(value))
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:
        return text


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(held) for held in (*value, *value.values()))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _has_address(value: Any) -> bool:
    return f"{id(value):x}" in repr(value).lower()


def _is_users(value: Any) -> bool:
    """Whether something comes from a file that is no library's."""
    if not (inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value)):
        return _is_users(type(value))
    try:
        file = inspect.getsourcefile(inspect.unwrap(value) if inspect.isfunction(value) else value)
    except TypeError:  # built in
        return False
    libraries = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    module = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    if file is None or str(module).partition(".")[0] == "dpoeng":
        return False
    return not any(Path(file).is_relative_to(library) for library in libraries)
