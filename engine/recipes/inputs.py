"""What training reads before it loads a model: the views of the cache, the held-out split, and checks of both."""

from __future__ import annotations

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import pair_key
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.training.order import hold_out


def refuse_sums_for_tokens(config: TrainConfig, view: View) -> None:
    """Raises UserError where the loss weighs single tokens and the cache holds sums only."""
    if view.spec.holds_sums and config.ld_alpha is not None:
        raise UserError(
            "this loss weighs single tokens, and these reference log-probs are sums over whole responses",
            code="cache-sums-only",
            where="--ld-alpha",
            expected="a cache that `dpoeng precompute-ref` wrote",
            found=f"view {view.name}, imported from {view.meta['imported']['name']}",
            remedy="leave --ld-alpha out, or run precompute-ref on the pairs",
        )


def split(view: View, eval_view: View | None, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to evaluate on. With `eval_view`, all of each."""
    if eval_view is not None:
        if eval_view.spec.digest != view.spec.digest:
            raise UserError(
                "training and evaluation pairs were scored by different references",
                code="eval-reference",
                where="--eval-view",
                expected=f"the reference of {view.name}: {view.spec.digest}",
                found=f"{eval_view.name}: {eval_view.spec.digest}",
                remedy="run precompute-ref for both files with the same model options",
            )
        return list(range(len(view))), list(range(len(eval_view)))
    train_indices, eval_indices = hold_out(
        [view[row].ids.prompt_ids.tobytes() for row in range(len(view))], config.eval_share, config.seed
    )
    return train_indices, eval_indices


def check_held_out(config: TrainConfig, count: int) -> None:
    """Refuses what needs held-out pairs where there are none.

    Raises:
        UserError: early stopping, the best model or samples were asked for.
    """
    wants = [
        option
        for option, asked in (
            ("--load-best-model-at-end", config.load_best_model_at_end),
            ("--early-stopping-patience", config.early_stopping_patience is not None),
            ("--samples", bool(config.samples)),
        )
        if asked
    ]
    if wants and not count:
        raise UserError(
            "there are no held-out pairs",
            code="eval-empty",
            where=", ".join(wants),
            expected="pairs that are not trained on",
            found=f"--eval-share {config.eval_share:g} of the prompts is none",
            remedy="raise --eval-share, name other pairs with --eval-view, or leave these options out",
        )


def check_apart(view: View, eval_view: View) -> str:
    """What to tell of pairs, or prompts, that are both trained and evaluated on; empty where there are none.

    As in `dpoeng check --eval` a pair is the same either way round; texts are compared by their token ids.

    Raises:
        UserError: all pairs that are evaluated on are trained on.
    """
    trained = {view.key(row) for row in range(len(view))}
    prompts = {view[row].ids.prompt_ids.tobytes() for row in range(len(view))}
    pairs = also = 0
    for row in range(len(eval_view)):
        ids = eval_view[row].ids
        if eval_view.key(row) in trained or pair_key(ids.swapped()) in trained:
            pairs += 1
        elif ids.prompt_ids.tobytes() in prompts:
            also += 1
    if pairs == len(eval_view):
        raise UserError(
            "all pairs that are to be evaluated on are trained on too",
            code="eval-trained-on",
            where=f"--eval-view {eval_view.name}",
            expected=f"pairs that the training view {view.name} does not hold",
            found=f"{pairs} of {len(eval_view)} are in both",
            remedy="say --eval-share 0.1 in place of --eval-view, to keep a tenth of the pairs out of training; or run "
            "precompute-ref on other pairs and name their view",
        )
    told = [counted(pairs, "pair")] if pairs else []
    told += [f"{also} more by prompt alone" if pairs else f"{counted(also, 'pair')} by prompt alone"] if also else []
    if not told:
        return ""
    return (
        f"of {counted(len(eval_view), 'pair')} in {eval_view.name}, to be evaluated on, these are trained on too (in "
        f"{view.name}): {' and '.join(told)}; their figures tell what was learnt by heart; --eval-share 0.1 in place "
        "of --eval-view splits by prompt"
    )
