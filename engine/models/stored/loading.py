"""Loads checkpoints with quantised files and keeps their codes. Imports transformers.

transformers loads the other tensors as usual; this module puts each quantised matrix into its linear layer or
stack of experts. If transformers converts several weights into one in another way, or a weight does not belong to a
linear layer, it is widened while loading, which a note reports.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.models.experts.stacks import placeholder, stack_names
from dpoeng.engine.models.fsdp_loading import prepared_class
from dpoeng.engine.models.model_config import without_quantization
from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.models.stored.formats import Format
from dpoeng.engine.models.stored.reading import read_weight, stored_parts
from dpoeng.engine.models.stored.weights import StoredStack, StoredWeight, store_linear

_NARROW = ("F8_", "F4", "F6_", "I8", "U8", "I32")
"""safetensors' dtypes of codes, which are not weights by themselves."""


@dataclass(slots=True)
class Matrix:
    """One quantised matrix (or a stack of them) in the files.

    Attributes:
        name: the weight's name in a plain checkpoint.
        key: the name of one of its tensors.
        parts: its parts (`codes`, `scales`, ...), as slices of files.
        stored: the format.
        source: the checkpoint, for messages.
        device: the target device.
    """

    name: str
    key: str
    parts: Mapping[str, Any]
    stored: Format
    source: ModelSource
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def read(self, shape: tuple[int, int] | None = None) -> StoredWeight:
        """The matrix, with the model's shape, or with that of the codes if none is given.

        Raises:
            UserError: its parts do not fit together.
        """
        tensors = {what: part[...].to(self.device) for what, part in self.parts.items()}
        with self._telling():
            rows, columns = shape or self.shape()
            return read_weight(self.stored, tensors, (rows, columns))

    def read_stack(self, shape: tuple[int, int, int]) -> StoredStack:
        """The matrices of all experts, if the files have one tensor per part."""
        tensors = {what: part[...].to(self.device) for what, part in self.parts.items()}
        with self._telling():
            if any(len(tensor) != shape[0] for tensor in tensors.values()):
                raise ValueError(f"parts of {len(tensors['codes'])} experts where the model has {shape[0]}")
            each = [{what: tensor[i].flatten(1) if what == "codes" else tensor[i] for what, tensor in tensors.items()}
                    for i in range(shape[0])]  # fmt: skip
            return StoredStack([[read_weight(self.stored, parts, shape[1:])] for parts in each])

    def shape(self) -> tuple[int, ...]:
        """Shape of the widened weight: (O, I), or (E, O, I)."""
        codes = self.parts["codes"]
        sizes, bits = list(codes.get_shape()), self.stored.bits
        if self.stored.method == "gptq":
            groups = list(self.parts["scales"].get_shape())
            inputs = self.parts["groups"].get_shape()[0] if "groups" in self.parts else sizes[0] * 32 // bits
            return groups[1], inputs
        if self.stored.method == "awq":
            return sizes[1] * 8, sizes[0]
        if self.stored.whole:
            return sizes[0], sizes[1], sizes[2] * sizes[3] * 2
        if "shape" in self.parts:
            rows, columns = self.parts["shape"][...].tolist()
            return int(rows), int(columns)
        if str(codes.get_dtype()) == "U8":
            return sizes[0], sizes[1] * 2
        return sizes[0], sizes[1] * (32 // bits if str(codes.get_dtype()) == "I32" else 1)

    def _telling(self) -> Any:
        return _Telling(self)


class _Telling:
    """Turns a reader's ValueError into an error that names the tensor."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError)):
            matrix = self._matrix
            raise UserError(
                f"cannot widen a quantised weight of {matrix.source.name}",
                code="quantization-stored",
                where=f"{matrix.source.folder}, {matrix.name}",
                expected=matrix.stored.words + ", as its own tools write it",
                found=str(error),
                remedy="download the checkpoint again; or use the full-precision checkpoint, with --quantization 4bit "
                "or 8bit if memory is short",
            ) from error


class _Widened:
    """A quantised weight for transformers' loader: widened when read."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def __getitem__(self, index: Any) -> torch.Tensor:
        return widened(self._matrix, torch.float32)[index]

    def get_dtype(self) -> str:
        """safetensors' name of the dtype."""
        return "F32"

    def get_shape(self) -> list[int]:
        """Shape of the whole tensor."""
        return list(self._matrix.shape())


def widened(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The weight as in a plain checkpoint: [O, I], or [E, I, O] for stacks."""
    shape = matrix.shape()
    if len(shape) == 3:
        stack = matrix.read_stack((shape[0], shape[1], shape[2]))
        return stack.widened(0, shape[0], dtype).transpose(1, 2).contiguous()
    return matrix.read().widened(dtype)


@dataclass(slots=True)
class Found:
    """How a checkpoint's quantised matrices were loaded.

    Attributes:
        kept: number of matrices in memory as stored.
        widened: names in the files of the widened ones.
    """

    kept: int = 0
    widened: list[str] = field(default_factory=list)

    def remarks(self, stored: Format) -> tuple[str, ...]:
        """Notes for the user."""
        kept = f"{counted(self.kept, 'weight')} in {stored.words} kept as stored, widened for each product"
        if stored.activations:
            kept += f"; activations are not rounded (the checkpoint's own kernels round them {stored.activations})"
        first = f": {self.widened[0]}" if self.widened else ""
        more = f"{counted(len(self.widened), 'quantised weight')} widened while loading{first}"
        return (kept, more) if self.widened else (kept,)


def matrices(
    files: Mapping[str, Any], stored: Format, source: ModelSource, device: torch.device | None = None
) -> tuple[dict[str, Matrix], dict[str, Any]]:
    """The quantised matrices in some files by name, and all other tensors.

    Raises:
        UserError: a matrix lacks a part, or codes have no scales.
    """
    joint = "" if stored.whole else "."
    found: dict[str, Matrix] = {}
    taken: set[str] = set()
    for name in files:
        base = name.removesuffix(joint + stored.marker)
        if base == name:
            continue
        mine = {part: f"{base}{joint}{part}" for part in stored.parts if f"{base}{joint}{part}" in files}
        parts = {stored.parts[part]: files[one] for part, one in mine.items() if stored.parts[part]}
        if "weight_shape" in mine:
            parts["shape"] = files[mine["weight_shape"]]
        whole = base if stored.whole else f"{base}.weight"
        if not {"codes", "scales"} <= parts.keys():
            raise _refused(source, name, stored, "codes and scales do not have matching names")
        found[whole] = Matrix(whole, name, parts, stored, source, device or torch.device("cpu"))
        taken.update(mine.values())
    unused = tuple(joint + part for part, what in stored.parts.items() if not what)
    rest = {name: part for name, part in files.items() if name not in taken and not name.endswith(unused)}
    for name, part in rest.items():
        if str(part.get_dtype()).startswith(_NARROW) and (name.endswith(("weight", "packed", "qweight", "_blocks"))):
            raise _refused(source, name, stored, f"{part.get_dtype()} without scales")
    if not found:
        raise _refused(source, stored.marker, stored, "no tensor with this ending")
    return found, rest


def _refused(source: ModelSource, name: str, stored: Format, why: str) -> UserError:
    return UserError(
        f"the files of {source.name} do not match the quantisation in its config.json",
        code="quantization-stored",
        where=f"{source.folder}, {name}",
        expected=f"{stored.words}: {stored.marker} and its other parts",
        found=why,
        remedy="use the config.json that belongs to these weights, or the full-precision checkpoint",
    )


def stored_class(
    source: ModelSource, stored: Format, found: Found, prepare: Callable[[Any], Any] | None = None
) -> tuple[Any, Any]:
    """A checkpoint's model class that keeps quantised weights, and its config.

    `prepare` changes the model before it is loaded. transformers has no hook for this either: see `prepared_class`.
    """
    parent, config = prepared_class(source, prepare)

    def load(
        model: Any, state_dict: Any, checkpoint_files: Sequence[str], load_config: Any, expected_keys: Any = None
    ) -> tuple[Any, Any]:
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        del state_dict, expected_keys
        places = set((load_config.device_map or {"": "cpu"}).values())
        device = torch.device(places.pop())
        files: dict[str, Any] = {}
        for file in checkpoint_files:
            opened: Any = safe_open(file, framework="pt", device="cpu")
            files |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        coded, rest = matrices(files, stored, source, device)
        plan = _Plan(model, load_config, set(rest))
        keep, wide = plan.divide(coded)
        found.widened = sorted(name for name in wide if plan.knows(name))
        info, _ = convert_and_load_state_dict_in_model(
            model, {**rest, **{name: _Widened(matrix) for name, matrix in wide.items()}}, load_config
        )
        for target, those in keep.items():
            plan.put(target, those, load_config.dtype)
            info.missing_keys.discard(target)
            found.kept += len(those)
        return info, None

    fields = {"_load_pretrained_model": staticmethod(load), "__module__": parent.__module__}
    return type(parent.__name__, (parent,), fields), without_quantization(config)


class _Plan:
    """The place of each matrix of the files in a model that has no weights yet."""

    def __init__(self, model: Any, settings: Any, others: set[str]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = settings.weight_mapping or []
        self._model = model
        self._known = model.state_dict()
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self._converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._mixed = {self.target(name)[0] for name in others}

    def knows(self, name: str) -> bool:
        """Whether the model has a place for a tensor of the files."""
        return self.target(name)[0] in self._known

    def target(self, name: str) -> tuple[str, str | None]:
        """The model's name for a tensor, and the pattern of its conversion; None for a copy."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._known)
        if renamed not in self._known:
            plain, _ = rename_source_key(name, [], [], prefix, self._known)
            return (plain, None) if plain in self._known else (renamed, pattern)
        return renamed, pattern

    def divide(
        self, coded: Mapping[str, Matrix]
    ) -> tuple[dict[str, list[tuple[str | None, Matrix]]], dict[str, Matrix]]:
        """Matrices to keep, by target; and those to widen, or that belong to nothing that is loaded."""
        from transformers.core_model_loading import dot_natural_key

        targets: dict[str, list[tuple[str | None, Matrix]]] = defaultdict(list)
        for name in sorted(coded, key=dot_natural_key):
            target, pattern = self.target(name)
            targets[target].append((pattern, coded[name]))
        keep = {target: those for target, those in targets.items() if self._keeps(target, those)}
        wide = {matrix.name: matrix for target, those in targets.items() if target not in keep for _, matrix in those}
        return keep, wide

    def _keeps(self, target: str, those: Sequence[tuple[str | None, Matrix]]) -> bool:
        """Whether a weight of the model can stay quantised: a linear layer's, or a stack of experts."""
        if target not in self._known or target in self._mixed:
            return False
        path, _, last = target.rpartition(".")
        module = self._model.get_submodule(path)
        head = self._model.get_output_embeddings()
        if last in stack_names(module):
            pattern, matrix = those[0]
            return matrix.stored.whole if pattern is None else self._stacks(pattern, those, len(self._known[target]))
        return type(module) is nn.Linear and module is not head and last == "weight" and those[0][0] is None

    def _stacks(self, pattern: str, those: Sequence[tuple[str | None, Matrix]], experts: int) -> bool:
        """Whether a conversion only stacks experts, and concatenates their parts by rows."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        converter = self._converter(pattern)
        kinds = [type(step) for step in converter.operations]
        plain = kinds in ([MergeModulelist], [MergeModulelist, Concatenate])
        dims = [step.dim for step in converter.operations] in ([0], [0, 1])
        counts = Counter(pattern for pattern, _ in those)
        return plain and dims and all(counts[one] == experts for one in converter.source_patterns)

    def _converter(self, pattern: str) -> Any:
        return next(one for one in self._converters if pattern in one.source_patterns)

    def put(self, target: str, those: Sequence[tuple[str | None, Matrix]], dtype: torch.dtype) -> None:
        """Gives a module its quantised weight."""
        path, _, last = target.rpartition(".")
        module: Any = self._model.get_submodule(path)
        wanted = tuple(self._known[target].shape)
        pattern, matrix = those[0]
        if isinstance(module, nn.Linear):
            store_linear(module, matrix.read((wanted[0], wanted[1])), dtype)
        else:
            experts, rows, columns = wanted if not module.is_transposed else (wanted[0], wanted[2], wanted[1])
            if pattern is None:
                stack = matrix.read_stack((experts, rows, columns))
            else:
                order = self._converter(pattern).source_patterns
                height = rows // len(order)
                read = {one: [m.read((height, columns)) for p, m in those if p == one] for one in order}
                stack = StoredStack(list(zip(*(read[one] for one in order), strict=True)))
            device = stack.experts[0][0].codes.device
            setattr(module, last, placeholder(stack, torch.empty((1, 1, 1), dtype=dtype, device=device).expand(wanted)))
        getattr(module, last)._is_hf_initialized = True


def store_empty(model: Any, stored: Format) -> None:
    """Gives a model on the meta device the layers and tensors that loading such files would create.

    config.json says which layers are quantised: for `dpoeng plan`, which has no files.
    """
    head = model.get_output_embeddings()
    dtype = next(model.parameters()).dtype

    def read(rows: int, columns: int) -> StoredWeight:
        return read_weight(stored, stored_parts(stored, (rows, columns)), (rows, columns))

    for name, module in list(model.named_modules()):
        names = stack_names(module)
        for last in names if stored.covers(name if stored.whole else f"{name}.0.up_proj") else ():
            shape = getattr(module, last).shape
            experts, rows, columns = shape if not module.is_transposed else (shape[0], shape[2], shape[1])
            parts = 2 if last == "gate_up_proj" and not stored.whole else 1
            stack = StoredStack([[read(rows // parts, columns) for _ in range(parts)] for _ in range(experts)])
            setattr(module, last, placeholder(stack, torch.empty((1, 1, 1), dtype=dtype, device="meta").expand(shape)))
        if type(module) is nn.Linear and module is not head and stored.covers(name):
            store_linear(module, read(module.out_features, module.in_features), dtype)
