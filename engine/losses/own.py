"""User-written losses: found by name, and identified across runs by a hash of their code. Imports no torch."""

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
    """The arguments of a user's loss: B pairs, all log-probs in nats, float64, on the policy's device.

    Per-token arrays are padded with 0 after a response's end, so a sum over the last axis is the response's sum, and
    that sum divided by `chosen_tokens` is its mean.

    Attributes:
        chosen_logps: [B] log pi of the chosen responses, with gradient; likewise `rejected_logps`.
        ref_chosen_logps: [B] the same under the reference, without gradient; likewise `ref_rejected_logps`.
        chosen_token_logps: [B, C] log pi of each token, with gradient; rejected [B, R].
        ref_chosen_token_logps: [B, C] the same under the reference; rejected [B, R]. NaN if the cache was imported as
            sums over whole responses.
        chosen_mask: [B, C] bool, true where a response has a token; rejected [B, R].
        chosen_tokens: [B] number of tokens; likewise `rejected_tokens`.
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
    """The name of a user's loss, `module:function` or `file.py:function`, for `loss_type`.

    It is a str, so configs, records and messages treat it like other names. The function is loaded at first use:
    reading a config runs no foreign code.
    """

    __slots__ = ("_found", "_recorded")
    _found: Callable[[LossInputs], Tensor] | None
    _recorded: bool

    def __new__(
        cls, name: str, function: Callable[[LossInputs], Tensor] | None = None, *, recorded: bool = False
    ) -> OwnLoss:
        """Creates a loss from its name.

        Args:
            name: name of the loss.
            function: the function, if it was passed in Python and need not be loaded.
            recorded: whether only a run's file names it, not the user: then its code is not run.
        """
        loss = super().__new__(cls, name)
        loss._found, loss._recorded = function, recorded
        return loss

    @property
    def function(self) -> Callable[[LossInputs], Tensor]:
        """The function. Raises UserError if it is missing, or if only a run's record names it."""
        if self._recorded:
            raise UserError(
                "the run was trained with a user-written loss, and dpoeng does not run code that only a file names",
                code="loss-own-missing",
                where=f"run.json, loss_type {self}",
                expected="the loss, named by you on the command line",
                found="its name in the run's file",
                remedy=f"read the code, then add --loss-type {self}",
            )
        if self._found is None:
            self._found = find_function(self)
        return self._found

    @property
    def digest(self) -> str:
        """Hash of what the function computes, see `code_digest`."""
        return code_digest(self.function, str(self))


def as_own_loss(value: Any) -> Any:
    """`value` as an OwnLoss if it is or names a user's function, otherwise unchanged."""
    if isinstance(value, OwnLoss):
        return value
    if isinstance(value, str) and ":" in value:
        return OwnLoss(value.strip())
    if callable(value) and not isinstance(value, type):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return OwnLoss(f"{getattr(value, '__module__', None) or '__main__'}:{name}", value)
    return value


def find_function(name: str) -> Callable[[LossInputs], Tensor]:
    """Imports the module or runs the file in `name`, and returns its function.

    Raises:
        UserError: it does not exist, or its code fails.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _run_file(Path(place)) if place.endswith(".py") else _import(place)
    except UserError:
        raise
    except Exception as error:
        raise _missing(name, f"{type(error).__name__}: {error}", "the file or module with your loss failed") from error
    target: Any = module
    for part in attribute.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        listed = f"functions there: {', '.join(functions) or 'none'}"
        raise _missing(name, f"no function {attribute} in {place}; {listed}", "your loss was not found")
    return target  # type: ignore[no-any-return]


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
    """Loads a module from a file without writing bytecode next to it, which could be older than the source."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _missing(str(path), error.strerror or str(error), "the file with your loss cannot be read") from error
    module = types.ModuleType(path.stem)
    module.__file__ = str(path.resolve())
    # Register it under its path, which no import statement can name: dataclasses in the file look up their module.
    module.__name__ = module.__file__
    sys.modules[module.__name__] = module
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module


def _import(name: str) -> types.ModuleType:
    """Imports a module, also from the current folder, where console scripts do not look."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


# --------------------------------------------------------------------------- the same loss again


def code_digest(function: Callable[..., Any], name: str) -> str:
    """A hash of what a function computes: its code, its closure, and the names outside that it uses.

    It covers functions, classes and plain values of the user, in any module. It ignores comments, the layout of lines,
    and libraries, whose versions the run records.

    Raises:
        UserError: there is no source to read.
    """
    digest = hashlib.sha256()
    try:
        for part in _parts(function, set()):
            digest.update(part.encode() + b"\0")
    except (OSError, TypeError) as error:
        raise _missing(
            name, f"no source: {error}", "your loss could not be recognised after an interruption"
        ) from error
    return digest.hexdigest()[:32]


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    """The parts of a function or value, as texts in a fixed order."""
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
        for key, value_ in [*sorted(closed.items()), *defaults]:
            yield str(key)
            yield from _parts(value_, seen)
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
        yield repr(sorted(map(repr, value)))  # a set's order changes from process to process
    elif _is_plain(value):
        yield repr(value)
    elif hasattr(value, "__dict__") and _is_users(type(value)):  # a callable object
        yield from _parts(type(value), seen)
        for key, value_ in sorted(vars(value).items()):
            yield key
            yield from _parts(value_, seen)
    else:  # an object of a library, such as a tensor: its repr
        yield f"{type(value).__qualname__} {value!r}" if not _has_address(value) else type(value).__qualname__


def _used(names: list[str], place: dict[str, Any], seen: set[int]) -> Iterator[str]:
    """The user's own objects among `names`: in the module itself, or in the user's modules that are also named."""
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
    """The source without comments and layout; a lambda inside a call is kept line by line."""
    text = textwrap.dedent(inspect.getsource(value))
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:
        return text


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(part) for part in (*value, *value.values()))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _has_address(value: Any) -> bool:
    return f"{id(value):x}" in repr(value).lower()


def _is_users(value: Any) -> bool:
    """Whether something comes from a file that does not belong to a library."""
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
