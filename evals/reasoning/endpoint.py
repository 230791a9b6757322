"""Samples from a server that speaks OpenAI's API, such as vLLM in an environment of its own."""

import http.client
import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from unlearn.errors import RunFailed, UserError
from unlearn.evals.reasoning.completions import Completion, Place
from unlearn.evals.reasoning.options import MathOptions
from unlearn.evals.reasoning.problems import Prompt
from unlearn.evals.reasoning.sampling import stream_of

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Status codes after which the same request may succeed later."""
LONGEST_PAUSE = 60.0
BROKEN = (OSError, ValueError, http.client.HTTPException)
"""No connection, a timeout, an answer cut short."""


class _Here(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key is for the address that was given."""

    def redirect_request(self, *told: Any, **more: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Here)


@dataclass(frozen=True)
class Endpoint:
    """Where requests go: ``url`` up to and including ``/v1``, and the name of the model there.

    ``pause`` is the wait before the second try in seconds, doubled for each further one;
    ``seconds`` the most that one completion may take. The key is sent and never written.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    tries: int = 6
    pause: float = 1.0
    seconds: float = 3600.0

    def check(self) -> None:
        """Ask the server for its models, once, before any long work.

        Raises:
            UserError: no such address, nobody answers, or it has no such model.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"'{self.url}' is no address", "give http://HOST:PORT/v1")
        if self.concurrency < 1:
            raise UserError(f"--concurrency is {self.concurrency}", "give 1 or more")
        try:
            told = self._request("models", None, seconds=30)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise _refused(error.code, "the key is missing or wrong") from error
            return  # a server need not list its models
        except BROKEN as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"nobody answers at '{self.url}': {reason}",
                "start the server, or correct --endpoint",
            ) from error
        listed = told.get("data") if isinstance(told, dict) else None
        names = [str(one["id"]) for one in listed or [] if isinstance(one, dict) and "id" in one]
        if names and self.model not in names:
            raise UserError(
                f"'{self.url}' has no model '{self.model}'", f"one of {', '.join(names[:20])}"
            )

    def sample(
        self, prompts: Mapping[str, Prompt], places: Sequence[Place], options: MathOptions
    ) -> Iterator[list[Completion]]:
        """Ask for the samples, several at a time, one per request; give each as it comes.

        Prompts of token ids go to ``/completions``, turns to ``/chat/completions``. The server
        draws with its own generator from a seed that problem and sample decide.

        Raises:
            UserError: the server refuses a request.
            RunFailed: it does not answer, however often it is asked.
        """
        waiting: queue.SimpleQueue[Place] = queue.SimpleQueue()
        for place in places:
            waiting.put(place)
        done: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    place = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put(self._completion(prompts[place[0]], place, options, stopped))
                except BaseException as error:  # handed to the caller, whatever it is
                    done.put(error)
                    return

        for _ in range(min(self.concurrency, len(places))):
            # daemons: a stop need not wait for answers that nobody will read
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in places:
                found = _next(done)
                if isinstance(found, BaseException):
                    raise found
                yield [found]
        finally:
            stopped.set()

    def _completion(
        self, prompt: Prompt, place: Place, options: MathOptions, stopped: threading.Event
    ) -> Completion:
        path, body = _body(prompt, place, options)
        told = self._patiently(path, {"model": self.model, **body}, stopped)
        try:
            choice = told["choices"][0]
            text = _text(choice)
            truncated = choice.get("finish_reason") != "stop"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RunFailed(
                f"'{self.url}/{path}' answered without a completion: {str(told)[:200]}",
                "is it OpenAI's API? give --endpoint http://HOST:PORT/v1",
            ) from error
        tokens = (told.get("usage") or {}).get("completion_tokens")
        if not text.startswith(prompt.prefix):  # some servers give back what was begun for them
            text = prompt.prefix + text
        return Completion(place[0], place[1], text.rstrip(), tokens, truncated)

    def _patiently(self, path: str, body: Mapping[str, Any], stopped: threading.Event) -> Any:
        """Send a request, again after a pause where that may help."""
        for turn in range(1, self.tries + 1):
            wait = min(LONGEST_PAUSE, self.pause * 2 ** (turn - 1))
            try:
                return self._request(path, body, seconds=self.seconds)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(2000).decode("utf-8", "replace").strip()
                if error.code not in AGAIN:
                    raise _refused(error.code, said) from error
                why, wait = f"status {error.code}: {said[:200]}", max(wait, _asked_wait(error))
            except BROKEN as error:
                why = str(getattr(error, "reason", error))
            if turn < self.tries and not stopped.wait(wait):
                continue
            break
        raise RunFailed(
            f"'{self.url}' did not answer after {turn} tries: {why}",
            "what has come is kept with --out; the same command goes on",
        )

    def _request(self, path: str, body: Mapping[str, Any] | None, *, seconds: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers)
        with _OPENER.open(request, timeout=seconds) as response:
            return json.loads(response.read())


def _next(done: "queue.SimpleQueue[Completion | BaseException]") -> Completion | BaseException:
    """Wait for a result; in short waits, so that a stop is noticed meanwhile."""
    while True:
        with suppress(queue.Empty):
            return done.get(timeout=0.5)


def _body(prompt: Prompt, place: Place, options: MathOptions) -> tuple[str, dict[str, Any]]:
    body = {
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "n": 1,
        "seed": stream_of(options.seed, place) % 2**31,
    }
    if prompt.ids:
        return "completions", {"prompt": list(prompt.ids), **body}
    if prompt.prefix:  # vLLM's way to have the last turn continued
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    return "chat/completions", {"messages": [dict(turn) for turn in prompt.messages], **body}


def _text(choice: Mapping[str, Any]) -> str:
    """Give the text of a choice; what a server has set apart as reasoning is put back before it."""
    if "text" in choice:
        return str(choice["text"])
    message = choice["message"]
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    content = str(message.get("content") or "")
    return f"<think>\n{str(thought).strip()}\n</think>\n\n{content}" if thought else content


def _asked_wait(error: urllib.error.HTTPError) -> float:
    try:
        return min(LONGEST_PAUSE, float(error.headers.get("Retry-After") or 0))
    except ValueError:
        return 0.0


def _refused(code: int, said: str) -> UserError:
    hints = {
        401: "set OPENAI_API_KEY",
        403: "set OPENAI_API_KEY",
        404: "give --endpoint up to and including /v1, and --endpoint-model as the server has it",
    }
    return UserError(
        f"the endpoint refuses the request (status {code}): {said[:300]}",
        hints.get(code, "its message says why"),
    )
