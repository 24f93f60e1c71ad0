"""Phase one's trunk: the hidden states that enter a layer, for the texts of pairs that the cache lacks.

Where log-probs are computed too, one forward gives both: all states of a shard are committed before its log-probs, so
that a shard that is done again after a kill writes both again, byte for byte. Pairs whose log-probs are there already
take a forward that ends at the layer.
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
from dpoeng.engine.scoring.layout import pair_group, share_prompts
from dpoeng.engine.scoring.passes import up_to_layer
from dpoeng.engine.scoring.texts import Place

OBJECT_BYTES: Final = 64 << 20
"""An object is committed when it holds so many bytes of states: what waits in memory, and what a kill can cost."""

REHEARSAL_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Mean |difference| a token, nats, between the whole model and the one that begins at the trunk, over the same rows.
Seen is 0 in all architectures that can begin there."""


@dataclass(slots=True)
class TrunkWork:
    """What is to be stored of a trunk, known before the model is loaded.

    Attributes:
        spec: of the trunk.
        index: texts that the cache holds.
        mine: shards of this process of pairs whose log-probs are there, and states are not.
        objects: texts that this process will store together, key -> tokens, in the order of the rows.
    """

    spec: ReferenceSpec
    index: TrunkIndex
    mine: Sequence[Sequence[PairIds]]
    objects: Sequence[Mapping[bytes, int]]

    @property
    def layer(self) -> int:
        """The layer that the states enter."""
        return self.index.layer

    @property
    def texts(self) -> int:
        """How many will be stored."""
        return sum(len(one) for one in self.objects)

    @property
    def n_bytes(self) -> int:
        """What will be written."""
        return sum(sum(one.values()) for one in self.objects) * token_bytes(self.spec)


def put_trunk(store: Store, spec: ReferenceSpec, source: ModelSource, value: float) -> ReferenceSpec:
    """Write the spec of the trunk that `--trunk-layer` asks for, of a reference with this spec.

    Raises:
        UserError: no such layer, or a kind of checkpoint that cannot begin at one.
    """
    if source.gguf:
        raise UserError(
            "a GGUF file is decoded whole, so nothing would be saved by a trunk of it",
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
    """What is missing of a trunk; damaged objects are set aside first.

    Args:
        store: the cache.
        trunk: its spec.
        pairs: of the whole data set, each once.
        keys: [N, 16] of these pairs.
        scored: places of pairs, by shard, whose log-probs all processes will compute: the same forwards give states.
        shard_tokens: most tokens of a shard.
        part: the share of this process.
        note: told of damage.
    """
    index = TrunkIndex.look_up(store, trunk.digest)
    for damage in index.quarantined:
        note(f"object {damage} of the trunk was damaged; it was set aside and its states are computed again")
    # Planned over what the last finished run left, as the shards of log-probs are.
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
    """Which texts of each shard are stored together: those that no shard before it has, cut at `OBJECT_BYTES`.

    A function of the shards and of what the last finished run left, whatever has been committed since, and in whatever
    order forwards give the states.
    """
    seen: set[bytes] = set()
    objects: list[list[dict[bytes, int]]] = []
    for shard in shards:
        own: list[dict[bytes, int]] = []
        size = OBJECT_BYTES
        for ids in shard:
            for key, tokens in texts_of(ids).items():
                if key in seen or key in sealed:
                    continue
                seen.add(key)
                if size >= OBJECT_BYTES:
                    own.append({})
                    size = 0
                own[-1][key] = tokens
                size += tokens * bytes_a_token
        objects.append(own)
    return objects


@torch.no_grad()
def rehearse(lm: CausalLM, layer: int, pairs: Sequence[PairIds]) -> None:
    """Run a few pairs as phase two will, from the states that enter the layer, and compare.

    Raises:
        UserError: the upper layers give other numbers so: they need more than hidden states from below.
    """
    groups = [pair_group(ids) for ids in pairs]
    held: dict[bytes, torch.Tensor] = {}

    def see(places: Sequence[Place], states: torch.Tensor) -> None:
        for place in places:
            held.setdefault(text_key(place.prompt_ids, place.response_ids), _part(states, place).cpu())

    before = lm.states
    try:
        with watching(lm, layer, see, stops=False):
            expected, _ = score_groups(lm, groups)
        lm.states = lambda prompt, response: held[text_key(prompt, response)]
        with rehearsing(lm, layer):
            found, _ = score_groups(lm, groups)
        difference = float((found - expected).abs().mean())
        said = f"mean difference {difference:.3g} nats a token"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        difference, said = float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        lm.states = before
    if not difference <= REHEARSAL_TOLERANCE[lm.dtype]:
        raise UserError(
            f"the upper layers of {type(lm.base).__name__} need more from below than hidden states",
            code="trunk-unsupported",
            where=f"--trunk-layer {layer}, {len(pairs)} pairs run from the states that enter it",
            expected="the log-probs of the whole model",
            found=said,
            remedy="leave --trunk-layer out: all layers are then run in phase two",
        )


def rehearsal_pairs(lm: CausalLM, shards: Sequence[Sequence[PairIds]]) -> list[PairIds]:
    """Two short pairs, and a long one where some layers look back over a window that it fills.

    Shards hold long pairs first, so the ends of two of them will do.
    """
    ordered = sorted([*shards[0][:1], *shards[-1][-2:]], key=lambda ids: ids.total_tokens)
    reached = windows(lm.base.config, longest_text(ordered))
    return ordered[:2] + (ordered[2:][-1:] if reached else [])


def _part(states: torch.Tensor, place: Place) -> torch.Tensor:
    return states[place.row, place.begin : place.end]


class TrunkWriter:
    """Takes states as forwards give them, and commits each planned object as soon as it is complete."""

    def __init__(self, store: Store, work: TrunkWork, provenance: Mapping[str, Any]) -> None:
        self._store, self._work, self._provenance = store, work, provenance
        self._object_of = {key: number for number, one in enumerate(work.objects) for key in one}
        self._held: dict[int, dict[bytes, ByteArray]] = {}
        self.stored_bytes = 0

    @property
    def layer(self) -> int:
        """The layer that the states enter."""
        return self._work.layer

    def see(self, places: Sequence[Place], states: torch.Tensor) -> None:
        """Keep what is planned of a forward; the watch calls this.

        Raises:
            UserError: these are not the states that were planned for, or no numbers.
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
            held = self._held.setdefault(number, {})
            # A copy, unless the device has made one: a part of a forward would hold all of its states.
            held[key] = (part.clone() if part.device == states.device else part).view(torch.uint8).numpy()
            if len(held) == len(self._work.objects[number]):
                self._commit(number)

    def _commit(self, number: int) -> None:
        held = self._held.pop(number)
        texts = [(key, held[key]) for key in self._work.objects[number]]
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
    """Hand the states of every forward in the block to a writer; nothing where there is none."""
    if writer is None:
        yield
        return
    with watching(lm, writer.layer, writer.see, stops=stops):
        yield


@torch.no_grad()
def store_states(lm: CausalLM, batches: Sequence[Sequence[PairIds]], note: Callable[[str], None]) -> Iterator[None]:
    """Forwards over some batches that end at the watched layer; yields when each is done.

    Of a model that is run by layer, all batches of a pass go through a layer before the next one is loaded.

    Raises:
        UserError: a pair alone does not fit into memory.
    """

    def run(some: Sequence[PairIds]) -> list[None]:
        predict_groups(lm, share_prompts(some)[0])
        return []

    def too_long(some: Sequence[PairIds], said: str) -> UserError:
        return too_large(some, said, phase="storing hidden states", helps="use a shorter --max-length")

    if lm.by_layer is not None:
        yield from up_to_layer(lm, [share_prompts(batch)[0] for batch in batches], lm.watch.number)
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
