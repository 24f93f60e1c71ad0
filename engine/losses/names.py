"""The losses by name, with their source and their settings. Imports no torch.

Names are TRL's if TRL has the loss. `pairwise`, `likelihood` and `unpaired` contain the functions, and `batch` maps the
names to them; docs/losses.md explains when to use which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from dpoeng.engine.losses.own import OwnLoss

LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "ipo",
    "hinge",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "dpop",
    "beta_dpo",
    "simpo",
    "cpo",
    "orpo",
    "sft",
    "kto",
    "apo_zero_unpaired",
    "bco",
    "soft_sigmoid",
    "plackett_luce",
    "listnet",
    "lipo_lambda",
]
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass(frozen=True, slots=True)
class LossFacts:
    """Facts about a loss: its source, its settings, and whether it needs a reference.

    Attributes:
        paper: authors, year and name.
        equation: place in the paper.
        url: the paper's address.
        reference: whether it reads the cached log-probs. Other losses still take their pairs from the cache.
        f_divergence: whether it depends only on the difference of the two scores. Then f-DPO's normaliser cancels, and
            `f_divergence_type` may be other than reverse_kl.
        whole_batch: whether a pair's loss depends on the other pairs of its optimizer step.
        rows: the kind of rows it needs, see `cache.records.ROW_KINDS`; a loss of pairs is one
            of ranked rows too, see `fitting_rows`.
        of_list: whether it looks at all responses of a ranked row at once, and at no pairs.
        settings: the fields that it reads besides `beta`.
    """

    paper: str
    equation: str
    url: str
    reference: bool = True
    f_divergence: bool = False
    whole_batch: bool = False
    rows: str = "pairs"
    of_list: bool = False
    settings: tuple[str, ...] = ()


_LABEL_WEIGHTS = ("desirable_weight", "undesirable_weight")


def _arxiv(number: str) -> str:
    return f"https://arxiv.org/abs/{number}"


LOSS_FACTS: dict[str, LossFacts] = {
    "sigmoid": LossFacts(
        "Rafailov et al. 2023, DPO",
        "equation 7",
        _arxiv("2305.18290"),
        f_divergence=True,
        settings=("label_smoothing",),
    ),
    "sigmoid_norm": LossFacts(
        "Lambert et al. 2024, Tulu 3", "length-normalised DPO", _arxiv("2411.15124"), f_divergence=True
    ),
    "robust": LossFacts(
        "Chowdhury et al. 2024, robust DPO",
        "section 3.1",
        _arxiv("2403.00409"),
        f_divergence=True,
        settings=("label_smoothing",),
    ),
    "ipo": LossFacts("Azar et al. 2023, IPO", "equation 17", _arxiv("2310.12036"), f_divergence=True),
    "hinge": LossFacts(
        "Zhao et al. 2023, SLiC-HF; normalised by the reference as in Liu et al. 2023, RSO",
        "RSO section 2.2",
        _arxiv("2309.06657"),
        f_divergence=True,
    ),
    "exo_pair": LossFacts(
        "Ji et al. 2024, EXO", "equation 16", _arxiv("2402.00856"), f_divergence=True, settings=("label_smoothing",)
    ),
    "nca_pair": LossFacts("Chen et al. 2024, NCA", "section 4.1, two responses", _arxiv("2402.05369")),
    "bco_pair": LossFacts("Jung et al. 2024, BCO", "section 4", _arxiv("2404.04656"), settings=("bco_reward_shift",)),
    "sppo_hard": LossFacts("Wu et al. 2024, SPPO with P = 1 and 0", "equation 4.7", _arxiv("2405.00675")),
    "aot": LossFacts(
        "Melnyk et al. 2024, AOT, paired",
        "section 3",
        _arxiv("2406.05882"),
        whole_batch=True,
        settings=("label_smoothing",),
    ),
    "aot_unpaired": LossFacts(
        "Melnyk et al. 2024, AOT, unpaired",
        "section 3",
        _arxiv("2406.05882"),
        whole_batch=True,
        settings=("label_smoothing",),
    ),
    "apo_zero": LossFacts("D'Oosterlinck et al. 2024, APO-zero", "equation 7", _arxiv("2408.06266")),
    "apo_down": LossFacts("D'Oosterlinck et al. 2024, APO-down", "equation 8", _arxiv("2408.06266")),
    "discopop": LossFacts(
        "Lu et al. 2024, DiscoPOP",
        "equation 5",
        _arxiv("2406.08414"),
        f_divergence=True,
        settings=("discopop_tau",),
    ),
    "dpop": LossFacts("Pal et al. 2024, DPO-Positive", "equation 3", _arxiv("2402.13228"), settings=("dpop_lambda",)),
    "beta_dpo": LossFacts(
        "Wu et al. 2024, beta-DPO",
        "sections 4.2 and 4.3",
        _arxiv("2407.08639"),
        whole_batch=True,
        settings=("beta_dpo_alpha", "beta_dpo_momentum", "beta_dpo_keep"),
    ),
    "simpo": LossFacts(
        "Meng et al. 2024, SimPO",
        "equation 6",
        _arxiv("2405.14734"),
        reference=False,
        settings=("simpo_gamma", "label_smoothing"),
    ),
    "cpo": LossFacts(
        "Xu et al. 2024, CPO",
        "equation 3",
        _arxiv("2401.08417"),
        reference=False,
        settings=("cpo_alpha", "label_smoothing"),
    ),
    "orpo": LossFacts("Hong et al. 2024, ORPO", "equation 6", _arxiv("2403.07691"), reference=False),
    "sft": LossFacts(
        "Pang et al. 2024, iterative RPO: the likelihood term", "equation 1", _arxiv("2404.19733"), reference=False
    ),
    "kto": LossFacts(
        "Ethayarajh et al. 2024, KTO",
        "equation 8",
        _arxiv("2402.01306"),
        whole_batch=True,
        rows="unpaired",
        settings=_LABEL_WEIGHTS,
    ),
    "apo_zero_unpaired": LossFacts(
        "D'Oosterlinck et al. 2024, APO-zero, response by response",
        "equation 7",
        _arxiv("2408.06266"),
        rows="unpaired",
        settings=_LABEL_WEIGHTS,
    ),
    "bco": LossFacts(
        "Jung et al. 2024, BCO",
        "section 4",
        _arxiv("2404.04656"),
        whole_batch=True,
        rows="unpaired",
        settings=_LABEL_WEIGHTS,
    ),
    "soft_sigmoid": LossFacts(
        "Furuta et al. 2024, soft preference labels: conservative DPO with a label for each pair",
        "section 2",
        _arxiv("2409.06691"),
        f_divergence=True,
        rows="ranked",
        settings=("score_scale",),
    ),
    "plackett_luce": LossFacts(
        "Rafailov et al. 2023, DPO under the Plackett-Luce model",
        "appendix A.3",
        _arxiv("2305.18290"),
        rows="ranked",
        of_list=True,
    ),
    "listnet": LossFacts(
        "Cao et al. 2007, ListNet; the softmax loss of Liu et al. 2024, LiPO",
        "top-one probabilities",
        _arxiv("2402.01878"),
        rows="ranked",
        of_list=True,
        settings=("score_scale",),
    ),
    "lipo_lambda": LossFacts(
        "Liu et al. 2024, LiPO-lambda",
        "section 4",
        _arxiv("2402.01878"),
        rows="ranked",
        of_list=True,
        settings=("score_scale",),
    ),
}


_OWN = LossFacts("a loss of your own", "", "")


def facts_of(name: str) -> LossFacts:
    """Facts about a loss; also for a user's loss."""
    return _OWN if isinstance(name, OwnLoss) else LOSS_FACTS[name]


def rows_of(names: Sequence[str]) -> str:
    """The kind of rows that some losses together are losses of."""
    kinds = [facts_of(name).rows for name in names]
    return "ranked" if "ranked" in kinds else kinds[0]


def fitting_rows(rows: str) -> tuple[str, ...]:
    """The kinds of views on which a loss of such rows trains: pairs can be made for ranked rows."""
    return (rows, "ranked") if rows == "pairs" else (rows,)


@dataclass(frozen=True, slots=True)
class LossSettings:
    """Everything that defines the loss; names and meaning as in TrainConfig."""

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    rpo_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    dpop_lambda: float = 50.0
    bco_reward_shift: bool = False
    beta_dpo_alpha: float = 0.6
    beta_dpo_momentum: float = 0.9
    beta_dpo_keep: float = 1.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    score_scale: float = 1.0
    pairs_in_row: str = "all"

    @classmethod
    def of(cls, config: Any) -> LossSettings:
        """The loss fields of a TrainConfig."""
        return cls(**{known.name: getattr(config, known.name) for known in fields(cls)})

    @property
    def whole_batch(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its optimizer step."""
        return any(facts_of(name).whole_batch for name in self.loss_type)

    @property
    def own(self) -> tuple[OwnLoss, ...]:
        """The user-written losses among these."""
        return tuple(name for name in self.loss_type if isinstance(name, OwnLoss))

    @property
    def rows(self) -> str:
        """The kind of rows that these losses need; see `LossFacts.rows`."""
        return rows_of(self.loss_type)

    @property
    def of_lists(self) -> bool:
        """Whether one of the losses looks at all responses of a row at once."""
        return any(facts_of(name).of_list for name in self.loss_type)

    @property
    def reads_mismatched(self) -> bool:
        """Whether a loss reads an unpaired row's mismatched response; if not, it need not be computed."""
        return "kto" in self.loss_type

    @property
    def remembers(self) -> bool:
        """Whether a loss depends on means over earlier optimizer steps."""
        return bool({"bco", "beta_dpo"} & set(self.loss_type)) or self.bco_reward_shift

    @property
    def sorts_pairs(self) -> bool:
        """Whether the i-th loss belongs to the i-th quantile instead of the i-th pair."""
        return any(name.startswith("aot") for name in self.loss_type)


# Names that users will try, and what to use instead.
OTHER_NAMES: dict[str, str] = {
    "dpo": "DPO is loss_type sigmoid",
    "cdpo": "cDPO is loss_type sigmoid with label_smoothing above 0",
    "rdpo": "robust DPO is loss_type robust",
    "slic": "SLiC is loss_type hinge",
    "exo": "it is called exo_pair",
    "nca": "it is called nca_pair",
    "sppo": "it is called sppo_hard",
    "apo": "it is apo_zero or apo_down",
    "aot_pair": "TRL 0.28 renamed aot_pair: use aot",
    "rpo": "RPO is loss_type sigmoid with rpo_alpha",
    "wpo": "WPO is use_weighting with any pairwise loss",
    "ld_dpo": "LD-DPO is loss_type sigmoid with ld_alpha",
    "kto_pair": "TRL dropped kto_pair; bco_pair or apo_zero are the nearest losses on pairs",
    "alphapo": "AlphaPO is not among dpoeng's losses; simpo is its limit alpha = 0",
}
_TDPO = (
    "TDPO needs the reference's whole distribution at every position, for a KL divergence over the vocabulary; the "
    "cache stores only the observed token's log-prob, so TDPO cannot be computed exactly"
)
OTHER_NAMES |= dict.fromkeys(("tdpo", "tdpo1", "tdpo2"), _TDPO)

_ONLY_SETTINGS = tuple(dict.fromkeys(name for facts in LOSS_FACTS.values() for name in facts.settings))


def check_names(names: Sequence[object]) -> None:
    """Raises ValueError for a name that belongs to another loss here, or to one that cannot be supported."""
    for name in names:
        key = str(name).strip().lower().replace("-", "_")
        if key in OTHER_NAMES:
            raise ValueError(f"unknown loss_type {name}: {OTHER_NAMES[key]}")


def check_combination(settings: Mapping[str, Any], changed: Sequence[str]) -> None:
    """Refuses combinations of losses and settings that make no sense.

    Args:
        settings: the loss fields of TrainConfig by name.
        changed: fields whose value is not the default: a setting without effect is refused, not ignored.

    Raises:
        ValueError: the conflict and its reason.
    """
    types: tuple[str, ...] = settings["loss_type"]
    facts = {name: facts_of(name) for name in types}
    listed = " + ".join(types)
    if len(facts) < len(types):
        raise ValueError(f"loss_type names a loss twice ({listed}); give it one weight in loss_weights")
    kinds = {known.rows for known in facts.values()}
    if "unpaired" in kinds and len(kinds) > 1:
        unpaired = ", ".join(name for name, known in facts.items() if known.rows == "unpaired")
        raise ValueError(
            f"loss_type {listed} mixes losses of several responses with {unpaired}, of rows with one response and a "
            "label"
        )
    if kinds == {"unpaired"}:
        for name in ("ld_alpha", "rpo_alpha", "use_weighting"):
            if settings[name]:
                raise ValueError(f"{name} cannot be used with loss_type {listed}: it needs pairs")
    lists = [name for name, known in facts.items() if known.of_list]
    for name in ("ld_alpha", "use_weighting"):
        if lists and settings[name]:
            raise ValueError(f"{name} cannot be used with {lists[0]}: it is made for pairs")
    weights = settings["loss_weights"]
    if weights is not None and len(weights) != len(types):
        raise ValueError(f"loss_weights has {len(weights)} numbers for the {len(types)} losses {listed}; give one each")
    for name in _ONLY_SETTINGS:
        takers = [loss for loss, known in LOSS_FACTS.items() if name in known.settings]
        if name in changed and not set(takers) & set(types):
            raise ValueError(f"{name} has no effect with loss_type {listed}; it belongs to {', '.join(takers)}")
    if "exo_pair" in types and settings["label_smoothing"] == 0:
        raise ValueError("exo_pair needs label_smoothing above 0, since it takes its logarithm; the paper uses 1e-3")
    if settings["rpo_alpha"] is not None and "sft" in types:
        raise ValueError("rpo_alpha and loss_type sft add the same kind of term; use one of them")
    if all(name in ("sft", "cpo") or isinstance(name, OwnLoss) for name in types) and settings["ld_alpha"] is not None:
        raise ValueError(
            f"ld_alpha has no effect with loss_type {listed}: it needs a loss of dpoeng with ratios to the reference"
        )
    _check_scores(settings, changed, listed, facts)
    whole = [name for name, known in facts.items() if known.whole_batch and name != "beta_dpo"]
    for field in ("use_weighting", "pair_weight_column"):
        if whole and settings[field]:
            raise ValueError(
                f"{field} cannot be used with {whole[0]}: it sorts the pairs of a batch, and a weight would no longer "
                "belong to its pair"
            )


def _check_scores(
    settings: Mapping[str, Any], changed: Sequence[str], listed: str, facts: Mapping[str, LossFacts]
) -> None:
    kind = settings["f_divergence_type"]
    if kind != "reverse_kl":
        others = [name for name, known in facts.items() if not known.f_divergence and name != "sft"]
        if others:
            fitting = [name for name, known in LOSS_FACTS.items() if known.f_divergence]
            raise ValueError(
                f"f_divergence_type {kind} has no meaning for {', '.join(others)}: the normaliser of f-DPO cancels "
                f"only in the difference of two scores; it can be used with {', '.join(fitting)}"
            )
        if set(facts) == {"sft"}:
            raise ValueError(f"f_divergence_type {kind} has no effect with loss_type {listed}")
    if "f_alpha_divergence_coef" in changed and kind != "alpha_divergence":
        raise ValueError(f"f_alpha_divergence_coef has no effect with f_divergence_type {kind}")
    normalised = [name for name in ("simpo", "orpo") if name in facts]
    if settings["ld_alpha"] is not None and normalised:
        raise ValueError(f"ld_alpha cannot be used with {normalised[0]}, which divides by the length already")
