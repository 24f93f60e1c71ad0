"""The functions of `import dpoeng`: each builds a config from its arguments, calls a recipe, and returns its summary.

They correspond to `cli/X.py` on the command line. They print nothing unless you ask, and read no `dpoeng.yaml`.
Libraries are imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

if TYPE_CHECKING:
    from torch import Tensor

    from dpoeng.engine.config.settings import (
        CheckSettings,
        CompareSettings,
        EvaluateSettings,
        ExportSettings,
        PlanSettings,
        PrecomputeSettings,
        RoundFields,
        TrainSettings,
    )
    from dpoeng.engine.data.in_memory import RowsInMemory
    from dpoeng.engine.losses.own import LossInputs
    from dpoeng.engine.recipes.cache_rows import CacheRows, ResponsesRows
    from dpoeng.engine.recipes.check import CheckReport
    from dpoeng.engine.recipes.compare import Generation
    from dpoeng.engine.recipes.elsewhere.export import ExportSummary
    from dpoeng.engine.recipes.evaluate import EvaluationSummary
    from dpoeng.engine.recipes.phase_two.summary import TrainSummary
    from dpoeng.engine.recipes.plan import Plan
    from dpoeng.engine.recipes.precompute import PrecomputeSummary
    from dpoeng.engine.recipes.rounds.judge import Judgement
    from dpoeng.engine.recipes.rounds.record import RoundSummary
    from dpoeng.engine.runtime.progress import Progress

StrPath = str | PathLike[str]


def check(
    pairs: Any,
    *,
    model: StrPath | None = None,
    eval_pairs: Any = None,
    examples: int = 3,
    **settings: Unpack[CheckSettings],
) -> CheckReport:
    """Look for anything in preference pairs that could spoil a run, before you use a GPU.

    >>> report = dpoeng.check("pairs.jsonl", model="sft-model")
    >>> [(finding.code, finding.count, finding.remedy) for finding in report.findings]

    Args:
        pairs: a path, several paths, or rows in memory: a list of dicts, a pandas DataFrame, a pyarrow Table, a
            `datasets.Dataset`. Rows have `prompt`, `chosen` and `rejected`; docs/data.md shows all shapes.
        model: model whose tokenizer measures lengths, truncation and end tokens. None: lengths are in characters.
        eval_pairs: your evaluation pairs, to find those that are also training pairs.
        examples: how many rows to show for each finding.
        settings: fields of `dpoeng check`, e.g. max_length.

    Raises:
        UserError: the pairs cannot be read, or there is no usable tokenizer.
    """
    from dpoeng.engine.config.fields import PrecomputeConfig
    from dpoeng.engine.config.files import config_of
    from dpoeng.engine.config.settings import CheckSettings
    from dpoeng.engine.recipes.check import check_pairs

    _refuse_others("check", CheckSettings, settings)
    values = _given(pairs=_sources(pairs), model=model, **settings)
    others = () if eval_pairs is None else _sources(eval_pairs)
    report = check_pairs(config_of(PrecomputeConfig, values), others, examples=examples)
    for finding in report.findings:
        for name in ("what", "why", "remedy", "detail"):
            setattr(finding, name, _in_python(getattr(finding, name)))
    return report


def plan(model: StrPath, **settings: Unpack[PlanSettings]) -> Plan:
    """Calculate the memory, hours and cost of a run, before you rent a card. Nothing is downloaded or measured.

    >>> plan = dpoeng.plan("Qwen/Qwen2.5-32B", gpu="a100-80gb", quantization="8bit", max_length=2048)
    >>> plan.cards[0].fits, plan.step.n_bytes / 2**30

    Args:
        model: a folder with config.json, or a name.
        settings: fields of `dpoeng plan`, e.g. gpu, gpus, quantization, max_length.

    Raises:
        UserError: the model or the card is unknown, or settings contradict each other.
    """
    from dpoeng.engine.config.files import config_of
    from dpoeng.engine.config.plan import PlanConfig
    from dpoeng.engine.config.settings import PlanSettings
    from dpoeng.engine.recipes.plan import make_plan

    _refuse_others("plan", PlanSettings, settings)
    values = dict(settings)
    if isinstance(gpu := values.get("gpu"), str):
        values["gpu"] = tuple(gpu.split(","))
    return make_plan(config_of(PlanConfig, {"model": model, **values}))


def precompute_reference(
    pairs: Any,
    *,
    model: StrPath,
    adapter: StrPath | None = None,
    cache: StrPath = "refcache",
    progress: bool | Progress = False,
    **settings: Unpack[PrecomputeSettings],
) -> PrecomputeSummary:
    """Phase one: run the frozen reference once over pairs and store its per-token log-probs in a cache.

    Call it again after an interruption, or with more pairs: only what the cache lacks is computed.

    >>> summary = dpoeng.precompute_reference("pairs.jsonl", model="sft-model", cache="refcache")
    >>> summary.pairs, summary.computed, summary.reference_accuracy

    Args:
        pairs: as for `check`. Rows in memory make a view called `rows-` and the digest of the rows; set `name` for
            another name.
        model: the SFT base: a folder, a .gguf file or a hub id.
        adapter: an SFT LoRA on it; the reference is base + adapter.
        cache: the cache's folder; created if missing.
        progress: True shows the command line's bars; an object with `task` and `note` is called instead.
        settings: fields of `dpoeng precompute-ref`, e.g. quantization, max_length, where.

    Raises:
        UserError: the data, the model, the settings or the cache cannot be used.
    """
    from dpoeng.engine.config.fields import PrecomputeConfig
    from dpoeng.engine.config.files import config_of
    from dpoeng.engine.recipes.precompute import precompute_reference as run

    values = _given(pairs=_sources(pairs), model=model, adapter=adapter, cache=cache, **settings)
    return run(config_of(PrecomputeConfig, values), _shown(progress))


def open_cache(
    cache: StrPath = "refcache", view: str | None = None, *, verify: Literal["open", "full"] = "full"
) -> CacheRows:
    """Open the rows of a cache: a sequence with numpy arrays on the mapped files.

    >>> rows = dpoeng.open_cache("refcache")
    >>> rows[0].prompt_ids, rows[0].chosen_logps, rows[0].extra    # [P] int32, [C] float32 in nats, your columns
    >>> rows[:100].to_pandas(), rows.to_arrow(), rows.to_torch()

    Args:
        cache: the cache's folder.
        view: the set of pairs; None if there is only one.
        verify: "full" compares every byte with its checksum, "open" only checks the structure.

    Raises:
        UserError: there is no such cache or view, or a file is damaged.
    """
    from dpoeng.engine.recipes.cache_rows import CacheRows

    return CacheRows.open(Path(cache), view, verify=verify)


def open_responses(
    cache: StrPath = "refcache", view: str | None = None, *, verify: Literal["open", "full"] = "full"
) -> ResponsesRows:
    """Open the rows of a cache, of whatever kind, each as a prompt with its responses and their scores or label.

    >>> rows = dpoeng.open_responses("refcache")
    >>> rows[0].responses, rows[0].sums, rows[0].scores    # one int32 array a response, floats in nats, floats

    Args:
        cache: the folder.
        view: the set of rows; None where there is one only.
        verify: "full" compares every byte with its checksum, "open" only the structure.

    Raises:
        UserError: there is no such cache or view, or a file is damaged.
    """
    from dpoeng.engine.recipes.cache_rows import ResponsesRows

    return ResponsesRows.open(Path(cache), view, verify=verify)


def train(
    *,
    cache: StrPath = "refcache",
    output_dir: StrPath = "out",
    loss: Callable[[LossInputs], Tensor] | None = None,
    on_metrics: Callable[[Mapping[str, float]], None] | None = None,
    progress: bool | Progress = False,
    **settings: Unpack[TrainSettings],
) -> TrainSummary:
    """Phase two: train a LoRA, or all weights, against the cached log-probs. No reference model is loaded.

    After an interruption, call it again with the same arguments: it continues from the newest checkpoint.

    >>> curve = []
    >>> summary = dpoeng.train(cache="refcache", output_dir="out", loss_type="sigmoid", on_metrics=curve.append)
    >>> summary.result, summary.eval_after["eval_rewards/accuracies"]

    Args:
        cache: the folder that phase one wrote; it names the model, adapter and precision.
        output_dir: folder for the adapter, the log and the checkpoints.
        loss: your own loss instead of `loss_type`: LossInputs of B pairs to [B], see docs/losses.md.
        on_metrics: called with every line of metrics, a dict of `step`, `loss`, `rewards/margins`, `eval_loss` ...
        progress: as for `precompute_reference`.
        settings: fields of `dpoeng train`, e.g. beta, learning_rate, lora_r, eval_view.

    Raises:
        UserError: the cache, the model or the settings cannot be used, or the policy does not match the cache.
    """
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.config.files import config_of
    from dpoeng.engine.recipes.phase_two.finished import finished_run

    config = config_of(TrainConfig, {"cache": cache, "output_dir": output_dir, **settings, **_own(loss, settings)})
    if (finished := finished_run(config)) is not None:
        return finished

    from dpoeng.engine.recipes.train import train as run

    return run(config, _shown(progress), on_metrics)


def evaluate(
    trained: StrPath,
    *,
    pairs: Literal["held-out", "all"] | None = None,
    progress: bool | Progress = False,
    **settings: Unpack[EvaluateSettings],
) -> EvaluationSummary:
    """Evaluate a trained policy on cached pairs: rewards, accuracy with its interval, by group, warnings.

    >>> found = dpoeng.evaluate("out")
    >>> found.evaluation.metrics["rewards/accuracies"], found.evaluation.intervals["rewards/accuracies"]

    Args:
        trained: a run's folder, an adapter, or a fully trained checkpoint.
        pairs: the pairs that its run held out, or all of the view. None: the former if there is a run and no `view`.
        progress: as for `precompute_reference`.
        settings: override the run's, e.g. cache, view, beta.

    Raises:
        UserError: the cache or the model cannot be used, or the pairs are not those of the run.
    """
    from dpoeng.engine.config.settings import EvaluateSettings
    from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained

    _refuse_others("evaluate", EvaluateSettings, settings)
    found = find_trained(Path(trained))
    which = "all" if pairs is None and "view" in settings else pairs
    # All pairs of the named view, which may be the run's evaluation view.
    others: dict[str, Any] = {"eval_view": None} if which == "all" and "view" in settings else {}
    if "view" in settings:
        others |= {"mix_with": (), "mix": None}
    return evaluate_trained(found, _config_of_run(found.run, {**others, **settings}), which, _shown(progress))


def compare(
    trained: StrPath,
    prompts: Sequence[str] = (),
    *,
    count: int = 4,
    chat: bool | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    **settings: Unpack[CompareSettings],
) -> list[Generation]:
    """Let the model answer prompts as before training and as after it.

    >>> for one in dpoeng.compare("out", ["Why is the sky blue?"], max_new_tokens=64):
    ...     print(one.prompt, one.before, one.after, sep="\\n---\\n")

    Args:
        trained: as for `evaluate`.
        prompts: texts; if empty, the first `count` prompts that the run held out.
        count: see `prompts`.
        chat: whether prompts are a user's messages for the chat template, or texts. None: as in phase one.
        max_new_tokens: maximum tokens of an answer.
        temperature: 0 takes the most likely token each time.
        repetition_penalty: above 1 keeps small models from repeating themselves.
        stop: texts that end an answer.
        seed: seed of the sampling.
        settings: override the run's, e.g. cache, view, device.

    Raises:
        UserError: the cache or the model cannot be used.
    """
    from dpoeng.engine.config.settings import CompareSettings
    from dpoeng.engine.recipes.compare import compare_prompts
    from dpoeng.engine.recipes.evaluate import find_trained

    _refuse_others("compare", CompareSettings, settings)
    found = find_trained(Path(trained))
    # Prompts of the named view, not of the run's evaluation view.
    others = {"eval_view": None, "mix_with": (), "mix": None} if "view" in settings else {}
    return compare_prompts(
        found,
        _config_of_run(found.run, {**settings, **others}),
        [prompts] if isinstance(prompts, str) else prompts,
        count=count,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )


def export(
    output_dir: StrPath,
    into: StrPath,
    *,
    to: Literal["merged", "gguf", "gguf-adapter", "vllm"],
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto",
    check_pairs: int = 4,
    force: bool = False,
    progress: bool | Progress = False,
    **settings: Unpack[ExportSettings],
) -> ExportSummary:
    """Write the result of a finished run for another program, load it again, and compare it with the trained policy.

    >>> written = dpoeng.export("out", "adapter.gguf", to="gguf-adapter")
    >>> written.path, written.rank, written.check.mean_diff

    Args:
        output_dir: the run's folder.
        into: a new folder; for `gguf` and `gguf-adapter` a file.
        to: a merged checkpoint, a GGUF model or adapter for llama.cpp, or an adapter for vLLM.
        dtype: dtype of the weights for `merged` and `gguf`; `auto` is the base's, `q8_0` is for `gguf` only.
        check_pairs: pairs of the cache on which the result is compared with the trained policy; 0 for none.
        force: replace an existing file.
        progress: as for `precompute_reference`.
        settings: override the run's, e.g. cache, view, model, device.

    Raises:
        UserError: the run is not complete, the program cannot load the result, or its log-probs differ.
    """
    from dpoeng.engine.config.settings import ExportSettings
    from dpoeng.engine.recipes.elsewhere.export import export as write
    from dpoeng.engine.recipes.evaluate import find_trained

    _refuse_others("export", ExportSettings, settings)
    config = _config_of_run(find_trained(Path(output_dir)).run, settings)
    return write(
        Path(output_dir),
        to,
        Path(into),
        config,
        dtype=dtype,
        check_pairs=check_pairs,
        force=force,
        progress=_shown(progress),
    )


def judge(
    trained: StrPath,
    *,
    judge: StrPath | Callable[[str, str], float | None],
    prompts: Sequence[str] = (),
    count: int | None = None,
    chat: bool | None = None,
    judge_model: str = "",
    api_key_env: str = "OPENAI_API_KEY",
    template: str | None = None,
    judge_max_tokens: int = 512,
    timeout: float = 300.0,
    retries: int = 6,
    concurrency: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 8,
    output_dir: StrPath | None = None,
    progress: bool | Progress = False,
    **settings: Unpack[CompareSettings],
) -> Judgement:
    """Let a judge compare answers before and after training, in both orders, and count wins with an interval.

    Answers and verdicts are stored by their content. Call it again after an interruption, and it continues; call it
    once more, and it asks no judge.

    >>> found = dpoeng.judge("out", judge="http://gpu1:8000/v1")
    >>> found.win_rate, found.win_rate_interval, found.length_controlled, found.unjudged

    Args:
        trained: as for `evaluate`.
        judge: an OpenAI-compatible server, up to /v1; a function (prompt, answer) -> number, also as
            `my_rule.py:score`; or a local model: a reward model or one that compares.
        prompts: texts; if empty, the prompts that the run held out.
        count: number of held-out prompts; None for all.
        chat: as for `compare`.
        judge_model: the model's name on the server; by default its only one.
        api_key_env: the environment variable with the server's key.
        template: the judge's prompt, a text with {prompt}, {first} and {second}.
        judge_max_tokens: maximum tokens of a reply.
        timeout: seconds before a request is sent again.
        retries: maximum number of retries.
        concurrency: number of parallel requests.
        max_new_tokens: maximum tokens of an answer.
        temperature: 0 takes the most likely token; above 0 samples.
        repetition_penalty: above 1: fewer repetitions.
        stop: texts that end an answer.
        seed: seed of the sampling.
        batch_size: prompts answered at once.
        output_dir: folder for answers and verdicts; None: `judge` in the run's folder.
        progress: as for `precompute_reference`.
        settings: override settings of the run, e.g. cache, view, device.

    Raises:
        UserError: the cache, the model or the judge is not usable.
    """
    from dpoeng.engine.config.settings import CompareSettings
    from dpoeng.engine.recipes.evaluate import find_trained
    from dpoeng.engine.recipes.rounds.answers import Sampling
    from dpoeng.engine.recipes.rounds.judge import judge_folder, judge_trained
    from dpoeng.engine.recipes.rounds.judges import TEMPLATE, JudgeSettings, find_judge

    _refuse_others("judge", CompareSettings, settings)
    shown, found = _shown(progress), find_trained(Path(trained))
    asking = JudgeSettings(
        server_model=judge_model,
        key_variable=api_key_env,
        template=TEMPLATE if template is None else template,
        max_tokens=judge_max_tokens,
        timeout_s=timeout,
        retries=retries,
        concurrency=concurrency,
        device=settings.get("device", "auto"),
    )
    others = {"eval_view": None, "mix_with": (), "mix": None} if "view" in settings else {}
    return judge_trained(
        found,
        _config_of_run(found.run, {**settings, **others}),
        find_judge(judge, asking, shown),
        Path(output_dir) if output_dir is not None else judge_folder(found),
        prompts=[prompts] if isinstance(prompts, str) else prompts,
        count=count,
        chat=chat,
        sampling=Sampling(
            max_new_tokens=max_new_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            batch_size=batch_size,
        ),
        progress=shown,
    )


def train_rounds(
    trained: StrPath,
    *,
    judge: StrPath | Callable[[str, str], float | None],
    reference: Literal["first", "last"],
    rounds: int = 1,
    samples: int = 4,
    prompts: StrPath | None = None,
    count: int | None = None,
    train_on: Literal["all", "new"] = "all",
    keep_cut: bool = False,
    judge_model: str = "",
    api_key_env: str = "OPENAI_API_KEY",
    template: str | None = None,
    judge_max_tokens: int = 512,
    timeout: float = 300.0,
    retries: int = 6,
    concurrency: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    server: str | None = None,
    server_key_env: str = "VLLM_API_KEY",
    output_dir: StrPath = "rounds",
    progress: bool | Progress = False,
    **settings: Unpack[RoundFields],
) -> list[RoundSummary]:
    """Sample answers from a run's policy, let a judge score them, and train on best-against-worst pairs, in rounds.

    Call it again after an interruption, and it continues. Increase `rounds` to add rounds.

    >>> for one in dpoeng.train_rounds("out", judge=score, reference="first", rounds=3):
    ...     print(one.number, one.mean_score, one.pairs, one.result)

    Args:
        trained: a run's folder; it does not change.
        judge: as for `judge`; a judge that compares sees every two answers in both orders.
        reference: each round's reference: `first`, the run's own; `last`, the policy that was sampled.
        rounds: total number of rounds.
        samples: answers per prompt.
        prompts: a file of prompts; None: those of the run's training pairs.
        count: prompts per round; each round takes the next ones; None for all.
        train_on: `all`: the run's pairs and those of every round; `new`: this round's pairs only.
        keep_cut: also use answers that `max_new_tokens` cut off.
        judge_model: as for `judge`, and so are `api_key_env`, `template`, `judge_max_tokens`, `timeout`, `retries` and
            `concurrency`.
        api_key_env: see `judge_model`.
        template: see `judge_model`.
        judge_max_tokens: see `judge_model`.
        timeout: see `judge_model`.
        retries: see `judge_model`.
        concurrency: see `judge_model`.
        max_new_tokens: maximum tokens of an answer.
        temperature: sampling temperature; above 0.
        top_p: sample from the most likely tokens with this total probability.
        repetition_penalty: above 1: fewer repetitions.
        stop: texts that end an answer.
        batch_size: prompts answered at once; not for a server.
        server: a vLLM or SGLang server, up to /v1, that samples instead of this machine.
        server_key_env: the environment variable with its key.
        output_dir: folder for the rounds' pairs, runs and cache.
        progress: as for `precompute_reference`.
        settings: override settings of the run for the rounds' trainings, e.g. learning_rate, max_steps, beta.

    Raises:
        UserError: rounds cannot start from this run, or a step fails.
    """
    from dpoeng.engine.config.settings import RoundFields
    from dpoeng.engine.recipes.evaluate import find_trained
    from dpoeng.engine.recipes.rounds.answers import Sampling
    from dpoeng.engine.recipes.rounds.begin import RoundSettings
    from dpoeng.engine.recipes.rounds.judges import TEMPLATE, JudgeSettings, find_judge
    from dpoeng.engine.recipes.rounds.rounds import train_rounds as run
    from dpoeng.engine.runtime.endpoint import Endpoint

    _refuse_others("train_rounds", RoundFields, settings)
    shown, found = _shown(progress), find_trained(Path(trained))
    config = _config_of_run(found.run, settings)
    asking = {"timeout_s": timeout, "retries": retries, "concurrency": concurrency}
    judging = JudgeSettings(
        server_model=judge_model,
        key_variable=api_key_env,
        template=TEMPLATE if template is None else template,
        max_tokens=judge_max_tokens,
        timeout_s=timeout,
        retries=retries,
        concurrency=concurrency,
        device=config.device,
    )
    wanted = RoundSettings(
        reference=reference,
        rounds=rounds,
        train_on=train_on,
        prompts=Path(prompts) if prompts is not None else None,
        count=count,
        keep_cut=keep_cut,
        sampling=Sampling(
            count=samples,
            max_new_tokens=max_new_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=config.seed,
            batch_size=batch_size,
        ),
        server=Endpoint.of(server, server_key_env, "--server", **asking) if server is not None else None,
    )
    return run(found, config, find_judge(judge, judging, shown), wanted, Path(output_dir), shown)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Compute log p(target) from hidden states and a head, without the logits; differentiable, for any trainer.

    The same in plain PyTorch, with [..., V] logits in memory:

        logits = (hidden @ weight.T).float()
        torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    Args:
        hidden: [..., H] hidden states after the final norm; bfloat16, float16, float32 or float64.
        weight: [V, H] head of the same dtype; gets a gradient if it requires one.
        targets: [...] int64 token ids; `ignore_index` gives 0.0 and no gradient.
        bias: [V].
        softcap: `cap * tanh(x / cap)` on the scaled logits (Gemma).
        scale: factor on the logits (Cohere's logit_scale).
        temperature: divisor after the softcap.
        ignore_index: see `targets`.

    Returns:
        [...] log-probs in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        IndexError: a target is outside the vocabulary, on a CPU; on a GPU its row is NaN.
    """
    from dpoeng.kernels.token_logps import token_logps as head

    if hidden.dim() == 0 or hidden.shape[:-1] != targets.shape:
        raise ValueError(f"hidden [..., H] and targets [...]: got {list(hidden.shape)} and {list(targets.shape)}")
    flat = hidden.reshape(-1, hidden.shape[-1])
    logps = head(
        flat,
        weight,
        targets.reshape(-1),
        bias=bias,
        softcap=softcap,
        scale=scale,
        temperature=temperature,
        ignore_index=ignore_index,
    )
    return logps.reshape(targets.shape)


# --------------------------------------------------------------------------- arguments


def _given(**values: Any) -> dict[str, Any]:
    """The arguments that are not None; defaults decide for the others."""
    return {name: value for name, value in values.items() if value is not None}


def _own(loss: Callable[[LossInputs], Tensor] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A user's function as `loss_type`."""
    from dpoeng.cache.errors import UserError
    from dpoeng.engine.losses.own import as_own_loss

    if loss is None:
        return {}
    if "loss_type" in settings or not callable(loss):
        raise UserError(
            "loss takes a function, and replaces loss_type",
            code="config-value",
            where="train(loss=...)",
            expected="a function, and no loss_type",
            found=f"loss {loss!r}" + (f", loss_type {settings['loss_type']}" if "loss_type" in settings else ""),
            remedy="leave one of them out; loss_type takes the name of a loss, of several, or functions among them",
        )
    return {"loss_type": (as_own_loss(loss),)}


def _sources(pairs: Any) -> tuple[Path | RowsInMemory, ...]:
    """Paths, or rows in memory."""
    from dpoeng.engine.data.in_memory import RowsInMemory

    if isinstance(pairs, str | PathLike):
        return (Path(pairs),)
    if isinstance(pairs, list | tuple) and pairs and all(isinstance(path, str | PathLike) for path in pairs):
        return tuple(Path(path) for path in pairs)
    return (RowsInMemory(pairs),)


def _config_of_run(run: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Any:
    from dpoeng.cli.evaluate import run_settings
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.config.files import config_of

    return config_of(TrainConfig, {**run_settings(run), **settings})


def _refuse_others(function: str, taken: type, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a field that the function does not use, since it would have no effect."""
    from dpoeng.engine.config.fields import known_fields
    from dpoeng.engine.config.problems import as_error, unknown_field

    wrong = [name for name in settings if name not in taken.__annotations__]
    if wrong:
        known = known_fields()
        fields = {**known, **{name: [*known.get(name, ()), function] for name in taken.__annotations__}}
        raise as_error([unknown_field(name, where=name, fields=fields, command=function) for name in wrong])


# --------------------------------------------------------------------------- progress


def _in_python(text: str) -> str:
    from dpoeng.engine.config.arguments import as_arguments

    return as_arguments(text)


def _shown(progress: bool | Progress) -> Progress:
    """The progress object for the recipe: the command line's bars, the caller's object, or only the log."""
    from dpoeng.engine.runtime.progress import NoProgress

    if not isinstance(progress, bool):
        return progress
    if progress:
        from dpoeng.cli.progress import TerminalProgress

        class Bars(TerminalProgress):
            def note(self, text: str) -> None:
                super().note(_in_python(text))

        return Bars()

    class Logged(NoProgress):
        """Shows no bars; sends notes to Python's log, where users who look will find them."""

        def note(self, text: str) -> None:
            import logging

            logging.getLogger("dpoeng").info(_in_python(text))

    return Logged()
