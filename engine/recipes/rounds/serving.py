"""Samples from a policy on a server: vLLM, SGLang, llama.cpp, or another whose OpenAI completions take token ids."""

from __future__ import annotations

from collections.abc import Sequence

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import IdArray
from dpoeng.engine.models.sources import find_adapter, find_model, read_adapter_fields
from dpoeng.engine.recipes.evaluate import Trained
from dpoeng.engine.recipes.rounds.answers import Sampling
from dpoeng.engine.reference.identity import weights_identity
from dpoeng.engine.runs.kept import Kept, content_key
from dpoeng.engine.runtime.endpoint import Endpoint, Refused
from dpoeng.engine.runtime.progress import Progress


def serve(endpoint: Endpoint, trained: Trained, base: str) -> str:
    """Returns the policy's name on the server, after loading its adapter there if the server allows that.

    The name contains a digest of the weights, so an earlier policy on the same server cannot answer for this one.

    Args:
        endpoint: the server.
        trained: the policy.
        base: the adapter's base model.

    Raises:
        UserError: the server is not reachable, or does not have this policy.
    """
    folder = str(trained.folder.resolve())
    adapter = None if trained.mode == "full" else find_adapter(folder)
    name = f"dpoeng-{weights_identity(adapter or find_model(folder))[:12]}"
    if name in endpoint.models():
        return name
    # vLLM loads adapters at /v1/load_lora_adapter, SGLang at /load_lora_adapter.
    for url in (endpoint.url, endpoint.url.removesuffix("/v1")) if adapter else ():
        try:
            endpoint.at(url).post("/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        except UserError as error:
            if error.code not in ("endpoint-refused", "endpoint-failed"):
                raise
        if name in endpoint.models():
            return name
    command = f"vllm serve {folder} --served-model-name {name}"
    if adapter is not None:
        rank = read_adapter_fields(adapter).get("r", 16)
        command = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}"
    raise UserError(
        "the server does not have this round's policy",
        code="round-server",
        where=endpoint.url,
        expected=f"a model called {name}, for example from: {command}",
        found=", ".join(endpoint.models()) or "no models",
        remedy="start the server with that command, then run yours again: it continues; or allow the server to load "
        "adapters while it runs",
        exit_status=5,
    )


def answer_on_server(
    endpoint: Endpoint,
    model: str,
    prompts: Sequence[IdArray],
    keys: Sequence[str],
    sampling: Sampling,
    kept: Kept,
    progress: Progress,
) -> dict[str, str]:
    """Samples answers to the prompts without stored ones, and stores `[{text, ended}]` for each complete prompt.

    Prompts are sent as token ids, so the server's chat template does not matter. Each answer is a separate request with
    its own seed; servers cache the common prompt.

    Returns:
        The server's reason for each prompt that it refused, by key.

    Raises:
        UserError: the server fails.
    """
    missing = [place for place, key in enumerate(keys) if kept.get(key) is None]
    # All that shapes the distribution is sent: vLLM takes the rest from generation_config.json, llama.cpp has top-k 40.
    bodies = [
        {
            "model": model,
            "prompt": prompts[place].tolist(),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0,
            "repetition_penalty": sampling.repetition_penalty,
            "repeat_penalty": sampling.repetition_penalty,  # llama.cpp's name; it looks back at 64 tokens by itself
            "repeat_last_n": len(prompts[place]) + sampling.max_new_tokens,
            "seed": int(content_key(keys[place], number)[:7], 16),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        }
        for place in missing
        for number in range(sampling.count)
    ]
    refused: dict[str, str] = {}
    found: dict[int, dict[int, dict[str, object]]] = {}
    with progress.task("answering prompts", len(prompts), "prompts", len(prompts) - len(missing)) as advance:
        for request, answer in endpoint.post_all("/completions", bodies):
            place = missing[request // sampling.count]
            try:
                if isinstance(answer, Refused):
                    raise TypeError(answer.why)
                choice = answer["choices"][0]
                one = {"text": str(choice["text"]), "ended": choice.get("finish_reason") != "length"}
            except (KeyError, IndexError, TypeError) as error:
                refused[keys[place]] = f"the server refused it: {str(error)[:200]}"
                continue
            of_prompt = found.setdefault(place, {})
            of_prompt[request % sampling.count] = one
            if len(of_prompt) == sampling.count:
                kept.put(keys[place], [of_prompt[number] for number in range(sampling.count)])
                advance(1, "")
    return refused
