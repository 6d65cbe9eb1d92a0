"""The body of an OpenAI request → what is to be generated, or one sentence about what is wrong with it."""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from alphaprune.sampling import Sampling
from alphaprune.serving.sampling import LARGEST_SEED

ROLES = ("system", "user", "assistant", "tool")
MOST_STOPS = 16
COLDEST = 1e-4  # a temperature below it is 0: logits divided by it would overflow
# Parameters that change nothing that a client could see here.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
# Parameters that are not done here, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "logit_processors": (),
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty")
DONE = {"model", "stream", "stream_options", "stop", "max_tokens", "logit_bias", "repetition_penalty", *SAMPLING}
DONE_CHAT = {"messages", "tools", "max_completion_tokens", "chat_template_kwargs"}


class Refused(Exception):
    """A request that gets no answer: HTTP status, one sentence, and the parameter that is wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's API."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Defaults:
    """What holds for a request that does not say otherwise, from the model's generation_config."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition: float = 1.0


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    prompt: text or tokens, None for a chat.   most: new tokens, None: as many as fit.   usage: a stream ends with it.
    """

    prompt: str | list[int] | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template: dict[str, Any]
    stream: bool
    usage: bool
    most: int | None
    stops: tuple[str, ...]
    sampling: Sampling


def parse(raw: bytes, chat: bool, name: str, vocabulary: int, defaults: Defaults) -> Asked:
    """What the body of a request for chat or text completion asks for; raises Refused if it is not to be had here.

    name: of the served model. vocabulary: tokens from 0 to this one exclusive exist.
    """
    body = _load(raw)
    _check_known(body, chat)
    model = body.get("model")
    if model is not None and model != name:
        raise Refused(
            404, f"the model {model!r} does not exist here; this server has {name!r}", "model", "model_not_found"
        )
    prompt, messages = (None, _messages(body)) if chat else (_prompt(body, vocabulary), [])
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refused(400, "stream_options: of these only include_usage is done here", "stream_options")
    most = next((name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), "max_tokens")
    return Asked(
        prompt=prompt,
        messages=messages,
        tools=_tools(body) if body.get("tool_choice") != "none" else None,
        template=_of(body, "chat_template_kwargs", dict, "an object") or {},
        stream=bool(_of(body, "stream", bool, "true or false")),
        usage=bool(options.get("include_usage")),
        most=_whole(body, most, None if chat else 16, 1, 2**31),
        stops=_stops(body),
        sampling=_sampling(body, vocabulary, defaults),
    )


def _load(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
        if b"\\u" in raw:
            json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except UnicodeError as error:
        raise Refused(400, "the body is not valid UTF-8 text") from error
    except ValueError as error:
        raise Refused(400, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise Refused(400, "the body is nested too deeply") from error
    if not isinstance(body, dict):
        raise Refused(400, "the body should be a JSON object")
    return body


def _check_known(body: dict[str, Any], chat: bool) -> None:
    known = DONE | HARMLESS | NEUTRAL.keys() | (DONE_CHAT if chat else {"prompt"})
    for name, value in body.items():
        if name not in known:
            raise Refused(400, f"{name}: no such parameter of this route", name, "unknown_parameter")
        if name in NEUTRAL and value is not None and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise Refused(400, f"{name}: not done here; leave it out", name, "unsupported_parameter")


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral  # True is 1 to Python, not to a client


def _of(body: dict[str, Any], name: str, kind: type, words: str) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise Refused(400, f"{name}: wanted {words}, got {_short(value)}", name)
    return value


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits:
        raise Refused(400, f"{name}: wanted a number from {low:g} to {high:g}, got {_short(value)}", name)
    return float(value)


def _whole(body: dict[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused(400, f"{name}: wanted a whole number from {low} to {high}, got {_short(value)}", name)
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _sampling(body: dict[str, Any], vocabulary: int, defaults: Defaults) -> Sampling:
    seed = _whole(body, "seed", None, -LARGEST_SEED, LARGEST_SEED)
    bias = _of(body, "logit_bias", dict, "an object of tokens and numbers") or {}
    for token, added in bias.items():
        if not token.isdecimal() or not int(token) < vocabulary:
            raise Refused(400, f"logit_bias: there is no token {_short(token)}", "logit_bias")
        _number({"logit_bias": added}, "logit_bias", 0, -100, 100)
    temperature = _number(body, "temperature", defaults.temperature, 0, 2)
    return Sampling(
        temperature=temperature if temperature >= COLDEST else 0.0,
        top_p=_number(body, "top_p", defaults.top_p, 0, 1),
        top_k=max(0, _whole(body, "top_k", defaults.top_k, -1, 2**31)),
        min_p=_number(body, "min_p", defaults.min_p, 0, 1),
        seed=secrets.randbits(62) if seed is None else seed,
        presence=_number(body, "presence_penalty", 0, -2, 2),
        frequency=_number(body, "frequency_penalty", 0, -2, 2),
        repetition=_number(body, "repetition_penalty", defaults.repetition, 0.01, 100),
        bias={int(token): float(added or 0) for token, added in bias.items()},
    )


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    stops = body.get("stop")
    stops = [stops] if isinstance(stops, str) else [] if stops is None else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, "stop: wanted a text or a list of texts, none of them empty", "stop")
    if len(stops) > MOST_STOPS:
        raise Refused(400, f"stop: wanted at most {MOST_STOPS}, got {len(stops)}", "stop")
    return tuple(stops)


def _prompt(body: dict[str, Any], vocabulary: int) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        if wrong := next((token for token in prompt if not 0 <= token < vocabulary), None):
            raise Refused(400, f"prompt: there is no token {wrong}", "prompt")
        return prompt
    if isinstance(prompt, list) and len(prompt) > 1:
        raise Refused(400, "prompt: one prompt per request here; send the others in requests of their own", "prompt")
    raise Refused(400, f"prompt: wanted a text or a list of tokens that is not empty, got {_short(prompt)}", "prompt")


def _tools(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = _of(body, "tools", list, "a list of functions")
    for tool in tools or []:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(400, "tools: each should be {'type': 'function', 'function': {'name': …}}", "tools")
    return tools or None


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: wanted a list of at least one message", "messages")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message as chat templates read it: content is text, arguments of calls are objects."""
    if not isinstance(message, dict):
        raise Refused(400, f"{where}: wanted an object, got {_short(message)}", where)
    role = {"developer": "system"}.get(str(message.get("role")), message.get("role"))
    if role not in ROLES:
        raise Refused(400, f"{where}.role: wanted one of {', '.join(ROLES)}, got {_short(role)}", f"{where}.role")
    made: dict[str, Any] = {"role": role, "content": _content(message, where)}
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            made[name] = message[name]
    calls = message.get("tool_calls")
    if calls:
        made["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    elif message.get("content") is None:
        raise Refused(400, f"{where}.content: wanted a text", f"{where}.content")
    return made


def _content(message: dict[str, Any], where: str) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [None]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused(400, f"{where}.content: this model reads text, got {_short(part)}", f"{where}.content")
    return "\n".join(part["text"] for part in parts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    made = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        try:
            arguments = function["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(function["name"], str) or not isinstance(arguments, dict):
                raise TypeError
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise Refused(400, f"{where}: each needs a function with a name and arguments in JSON", where) from error
        made.append({**call, "function": {**function, "arguments": arguments}})
    return made
