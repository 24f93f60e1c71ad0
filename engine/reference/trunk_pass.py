"""Phase one's trunk: stores the hidden states that enter a layer, for texts that the cache lacks.

If log-probs are computed too, one forward gives both: all states of a shard are committed before its log-probs, so that
a shard that is repeated after a kill writes both again, byte for byte. Pairs whose log-probs exist already need a
forward that ends at the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.index import TrunkIndex, commit_states
from dpoeng.cache.trunk.objects import ByteArray, token_bytes
from dpoeng.cache.trunk.texts import text_key, texts_of
from dpoeng.engine.data.token_rows import SomeIds
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.model_config import config_of, sizes, windows
from dpoeng.engine.models.sources import ModelSource, read_fields
from dpoeng.engine.models.trunk.layers import trunk_layer
from dpoeng.engine.models.trunk.stand_ins import rehearsing, watching
from dpoeng.engine.reference.limits import longest_text
from dpoeng.engine.reference.shards import Part, plan_shards
from dpoeng.engine.runtime.out_of_memory import in_parts, is_out_of_memory, too_large
from dpoeng.engine.scoring.forward import predict_groups, score_groups
from dpoeng.engine.scoring.layer_passes import Forwards, up_to_layer
from dpoeng.engine.scoring.layout import pair_group, share_prompts
from dpoeng.engine.scoring.texts import Place

OBJECT_BYTES: Final = 64 << 20
"""An object is committed at this many bytes of states: the memory it waits in, and the work that a kill can lose."""

REHEARSAL_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Allowed mean |difference| per token, nats, between the whole model and the one that begins at the trunk, for the same
rows. All architectures that can begin there gave 0."""


@dataclass(slots=True)
class TrunkWork:
    """The trunk states to store, known before the model is loaded.

    Attributes:
        spec: the trunk's spec.
        index: texts that the cache has already.
        mine: this process's shards of pairs that have log-probs but no states.
        objects: texts that this process will store together, key -> tokens, in the order of the rows.
    """

    spec: ReferenceSpec
    index: TrunkIndex
    mine: Sequence[Sequence[PairIds]]
    objects: Sequence[Mapping[bytes, int]]

    @property
    def layer(self) -> int:
        """The layer whose input the states are."""
        return self.index.layer

    @property
    def texts(self) -> int:
        """Number of texts to store."""
        return sum(len(one) for one in self.objects)

    @property
    def n_bytes(self) -> int:
        """Number of bytes to write."""
        return sum(sum(one.values()) for one in self.objects) * token_bytes(self.spec)


def put_trunk(store: Store, spec: ReferenceSpec, source: ModelSource, value: float) -> ReferenceSpec:
    """Writes the spec of the trunk that `--trunk-layer` requests, for a reference with this spec.

    Raises:
        UserError: no such layer, or a kind of checkpoint that cannot begin at one.
    """
    if source.gguf:
        raise UserError(
            "a GGUF file is decoded whole, so a trunk of it would save nothing",
            code="trunk-unsupported",
            where="--trunk-layer",
            expected="a checkpoint in safetensors",
            found=source.name,
            remedy="convert it to safetensors first (`dpoeng demo` shows how), or leave --trunk-layer out",
        )
    model = sizes(config_of(read_fields(source)))
    trunk = spec.of_states(trunk_layer(value, model.layers), spec.fields["dtype"], model.hidden)
    store.put_trunk_spec(trunk)
    return trunk


def plan_trunk(
    store: Store,
    trunk: ReferenceSpec,
    pairs: SomeIds,
    keys: npt.NDArray[np.uint8],
    scored: Sequence[npt.NDArray[np.int64]],
    shard_tokens: int,
    part: Part,
    note: Callable[[str], None],
) -> TrunkWork:
    """Finds what is missing of a trunk; damaged objects are moved to quarantine first.

    Args:
        store: the cache.
        trunk: its spec.
        pairs: the whole data set without duplicates.
        keys: [N, 16] of these pairs.
        scored: indices of pairs, by shard, whose log-probs all processes will compute: those forwards give states, too.
        shard_tokens: maximum tokens of a shard.
        part: the share of this process.
        note: receives messages about damage.
    """
    index = TrunkIndex.look_up(store, trunk.digest)
    for damage in index.quarantined:
        note(f"object {damage} of the trunk was damaged: moved to quarantine, and its states are recomputed")
    # Plan over what the last finished run left, as for the shards of log-probs.
    sealed = TrunkIndex.look_up(store, trunk.digest, sealed=True, known=index)
    with_logps = {place for shard in scored for place in shard.tolist()}
    old = [place for place, ids in enumerate(pairs) if place not in with_logps and not sealed.holds(ids)]
    some = np.asarray(old, dtype=np.int64)
    planned = [some[shard] for shard in plan_shards(pairs.at(some), keys[some], shard_tokens)] if old else []
    objects = plan_objects([pairs.at(shard) for shard in (*planned, *scored)], sealed, token_bytes(trunk))
    lacking = [[one for one in of_shard if not all(key in index for key in one)] for of_shard in objects]
    mine = [
        pairs.at(shard) for shard, own in zip(part.of(planned), part.of(lacking[: len(planned)]), strict=True) if own
    ]
    own = [*part.of(lacking[: len(planned)]), *part.of(lacking[len(planned) :])]
    return TrunkWork(trunk, index, mine, [one for of_shard in own for one in of_shard])


def plan_objects(
    shards: Sequence[Sequence[PairIds]], sealed: TrunkIndex, bytes_a_token: int
) -> list[list[dict[bytes, int]]]:
    """Decides which texts of each shard are stored together: those in no earlier shard, cut at `OBJECT_BYTES`.

    Depends only on the shards and on what the last finished run left, not on later commits or on the order in which
    forwards give states.
    """
    seen: set[bytes] = set()
    objects: list[list[dict[bytes, int]]] = []
    for shard in shards:
        new_objects: list[dict[bytes, int]] = []
        size = OBJECT_BYTES
        for ids in shard:
            for key, tokens in texts_of(ids).items():
                if key in seen or key in sealed:
                    continue
                seen.add(key)
                if size >= OBJECT_BYTES:
                    new_objects.append({})
                    size = 0
                new_objects[-1][key] = tokens
                size += tokens * bytes_a_token
        objects.append(new_objects)
    return objects


@torch.no_grad()
def rehearse(lm: CausalLM, layer: int, pairs: Sequence[PairIds]) -> None:
    """Runs a few pairs as phase two will, from the states that enter the layer, and compares.

    Raises:
        UserError: the upper layers then give other numbers: they need more than hidden states from below.
    """
    groups = [pair_group(ids) for ids in pairs]
    states_of: dict[bytes, torch.Tensor] = {}

    def see(places: Sequence[Place], states: torch.Tensor) -> None:
        for place in places:
            states_of.setdefault(text_key(place.prompt_ids, place.response_ids), _part(states, place).cpu())

    before = lm.states
    try:
        with watching(lm, layer, see, stops=False):
            expected, _ = score_groups(lm, groups)
        lm.states = lambda prompt, response: states_of[text_key(prompt, response)]
        with rehearsing(lm, layer):
            recomputed, _ = score_groups(lm, groups)
        difference = float((recomputed - expected).abs().mean())
        problem = f"mean difference {difference:.3g} nats per token"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        difference, problem = (
            float("inf"),
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )
    finally:
        lm.states = before
    if not difference <= REHEARSAL_TOLERANCE[lm.dtype]:
        raise UserError(
            f"the upper layers of {type(lm.base).__name__} need more from below than hidden states",
            code="trunk-unsupported",
            where=f"--trunk-layer {layer}, {len(pairs)} pairs run from the states that enter it",
            expected="the log-probs of the whole model",
            found=problem,
            remedy="leave --trunk-layer out: phase two then runs all layers",
        )


def rehearsal_pairs(lm: CausalLM, shards: Sequence[Sequence[PairIds]]) -> list[PairIds]:
    """Two short pairs, and a long one if some layers look back over a window that it fills.

    Shards have long pairs first, so the ends of two of them are enough.
    """
    ordered = sorted([*shards[0][:1], *shards[-1][-2:]], key=lambda ids: ids.total_tokens)
    reached = windows(lm.base.config, longest_text(ordered))
    return ordered[:2] + (ordered[2:][-1:] if reached else [])


def _part(states: torch.Tensor, place: Place) -> torch.Tensor:
    return states[place.row, place.begin : place.end]


class TrunkWriter:
    """Receives states from forwards, and commits each planned object as soon as it is complete."""

    def __init__(self, store: Store, work: TrunkWork, provenance: Mapping[str, Any]) -> None:
        self._store, self._work, self._provenance = store, work, provenance
        self._object_of = {key: number for number, one in enumerate(work.objects) for key in one}
        self._held: dict[int, dict[bytes, ByteArray]] = {}
        self.stored_bytes = 0

    @property
    def layer(self) -> int:
        """The layer whose input the states are."""
        return self._work.layer

    def see(self, places: Sequence[Place], states: torch.Tensor) -> None:
        """Keeps the planned states of a forward; called by the watch.

        Raises:
            UserError: the states have another shape or dtype than planned, or contain NaN or infinity.
        """
        self._check(states)
        for place in places:
            key = text_key(place.prompt_ids, place.response_ids)
            number = self._object_of.get(key)
            if number is None or key in self._held.get(number, {}):
                continue
            part = _part(states, place).detach().to("cpu").contiguous()
            if not bool(part.isfinite().all()):
                raise _not_finite(self._work.layer, place)
            collected = self._held.setdefault(number, {})
            # Copy, unless the device did: a view would keep all states of the forward alive.
            collected[key] = (part.clone() if part.device == states.device else part).view(torch.uint8).numpy()
            if len(collected) == len(self._work.objects[number]):
                self._commit(number)

    def _commit(self, number: int) -> None:
        collected = self._held.pop(number)
        texts = [(key, collected[key]) for key in self._work.objects[number]]
        commit_states(self._store, self._work.spec, texts, self._provenance)
        self.stored_bytes += sum(states.nbytes for _, states in texts)
        for key, _ in texts:
            del self._object_of[key]

    def _check(self, states: torch.Tensor) -> None:
        fields = self._work.spec.fields
        dtype = str(states.dtype).removeprefix("torch.")
        if states.dim() != 3 or (dtype, states.shape[-1]) != (fields["dtype"], fields["width"]):
            raise UserError(
                "this architecture's hidden states contradict the size in its config.json",
                code="trunk-unsupported",
                where=f"--trunk-layer {self._work.layer}",
                expected=f"[rows, tokens, {fields['width']}] in {fields['dtype']}",
                found=f"{list(states.shape)} in {dtype}",
                remedy="leave --trunk-layer out",
            )


@contextlib.contextmanager
def storing(lm: CausalLM, writer: TrunkWriter | None, *, stops: bool = False) -> Iterator[None]:
    """Passes the states of every forward in the block to a writer, if there is one."""
    if writer is None:
        yield
        return
    with watching(lm, writer.layer, writer.see, stops=stops):
        yield


@torch.no_grad()
def store_states(lm: CausalLM, batches: Sequence[Sequence[PairIds]], note: Callable[[str], None]) -> Iterator[None]:
    """Runs batches up to the watched layer; yields when each is done.

    In a model that runs by layer, all batches of a pass go through a layer before the next one is loaded.

    Raises:
        UserError: a single pair does not fit into memory.
    """

    def run(some: Sequence[PairIds]) -> list[None]:
        predict_groups(lm, share_prompts(some)[0])
        return []

    def too_long(some: Sequence[PairIds], problem: str) -> UserError:
        return too_large(some, problem, phase="storing hidden states", helps="use a shorter --max-length")

    if lm.by_layer is not None:
        forwards = Forwards(batches, lambda some: share_prompts(some)[0], too_long, note)
        yield from up_to_layer(lm, forwards, lm.watch.number)
        return
    for batch in batches:
        in_parts(run, batch, note=note, describe=too_long)
        yield


def _not_finite(layer: int, place: Place) -> UserError:
    return UserError(
        "the model gave hidden states that are NaN or infinite",
        code="reference-not-finite",
        where=f"the states that enter layer {layer}, a text of {place.end - place.begin} tokens",
        expected="finite numbers",
        found="NaN or infinity",
        remedy="some models overflow float16: use --dtype bfloat16 or float32",
        exit_status=5,
    )
