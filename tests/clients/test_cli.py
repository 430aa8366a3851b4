"""`shoal complete` and `shoal chat` with pipes for input and output."""

from __future__ import annotations

import json
import re
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from shoal import clients
from shoal.clients.cli import chat, complete
from tests.clients.fake_server import FakeServer, chat_chunks, chat_deltas, completion_chunks, error_body


@pytest.fixture
def shell(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command against the fake server."""
    monkeypatch.setenv("SHOAL_URL", server.url)

    def run(command: click.Command, *args: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(command, list(args), input=stdin)

    return run


def test_complete_prints_the_text_and_nothing_else_on_stdout(server: FakeServer, shell: Any) -> None:
    server.stream(*completion_chunks("grö", "ßer ", "🐟", seed=8))
    result = shell(complete, "def fib(n):")
    assert result.exit_code == 0
    assert result.stdout == "größer 🐟"
    assert re.fullmatch(
        r"\[2 tokens in \d+\.\d\d s, \d+\.\d tokens/s, first token after \d+\.\d{3} s, "
        r"finish reason: stop, seed 8\]\n",
        result.stderr,
    )


def test_an_answer_as_json(server: FakeServer, shell: Any) -> None:
    server.stream(*completion_chunks("grö", "ßer ", "🐟", seed=8))
    result = shell(complete, "def fib(n):", "--json")
    (line,) = result.stdout.splitlines()
    answer = json.loads(line)
    assert answer.pop("seconds") >= answer.pop("ttft_seconds") > 0
    assert answer.pop("usage")["num_output_tokens"] == 2
    assert answer == {"model": "shoal", "text": "größer 🐟", "reasoning": "", "finish_reason": "stop", "seed": 8}
    assert result.stderr == ""


def test_a_conversation_as_json_has_a_line_for_each_answer(server: FakeServer, shell: Any) -> None:
    server.stream(*chat_deltas({"reasoning_content": "Hmm."}, {"content": "Yes."}))
    server.stream(*chat_chunks("No."))
    result = shell(chat, "--max-tokens", "9", "--json", stdin="Well?\nReally?\n")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(answer["text"], answer["reasoning"]) for answer in answers] == [("Yes.", "Hmm."), ("No.", "")]
    assert server.requests[-1].body["messages"][1] == {"role": "assistant", "content": "Yes."}
    assert result.stderr == ""


def test_thoughts_go_to_stderr(server: FakeServer, shell: Any) -> None:
    server.stream(*chat_deltas({"reasoning_content": "Hmm"}, {"reasoning_content": "."}, {"content": "Yes."}))
    result = shell(chat, "--max-tokens", "9", stdin="Well?\n")
    assert result.stdout == "Yes.\n"
    assert result.stderr.startswith("Hmm.\n[2 tokens in ")


def test_complete_sends_what_was_given_and_no_more(server: FakeServer, shell: Any) -> None:
    for _ in range(2):
        server.stream(*completion_chunks("x"))
    shell(complete, "p")
    args = "--max-tokens 64 --temperature 0 --top-p 0.9 --top-k 5 --min-p 0.1 --repetition-penalty 1.2 --seed 7"
    shell(complete, "p", *args.split(), "--model", "m", "--stop", "a", "--stop", "b", "--api-key", "secret")

    bare, full = server.requests
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert bare.body == {"prompt": "p", **streamed}
    assert full.body == {
        "prompt": "p", "max_tokens": 64, "temperature": 0.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "repetition_penalty": 1.2, "seed": 7, "model": "m", "stop": ["a", "b"], **streamed,
    }  # fmt: skip
    assert full.headers["authorization"] == "Bearer secret"


def test_complete_takes_the_prompt_from_stdin_to_the_byte(server: FakeServer, shell: Any) -> None:
    server.stream(*completion_chunks("x"))
    shell(complete, "-", stdin="  zwei\r\nZeilen 🐟\n".encode())
    assert server.requests[0].body["prompt"] == "  zwei\r\nZeilen 🐟\n"


@pytest.mark.parametrize(("command", "args"), [(complete, ["-"]), (chat, ["--max-tokens", "9"])])
def test_stdin_that_is_not_utf8(shell: Any, command: click.Command, args: list[str]) -> None:
    result = shell(command, *args, stdin=b"\xff\xfe\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: standard input is not UTF-8")


def test_the_environment_and_the_command_line(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("SHOAL_API_KEY", "from the environment")
    server.stream(*completion_chunks("x"))
    result = CliRunner().invoke(complete, ["p", "--url", server.url])
    assert result.exit_code == 0
    assert server.requests[0].headers["authorization"] == "Bearer from the environment"


@pytest.mark.parametrize(("command", "args"), [(complete, ["p"]), (chat, ["--max-tokens", "9"]), (chat, [])])
def test_an_error_is_one_line_and_exit_code_1(
    server: FakeServer, shell: Any, command: click.Command, args: list[str]
) -> None:
    server.error(429, "the queue\nis full", Retry_After="3")
    result = shell(command, *args, stdin="hello\nnever sent\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: the queue is full (try again in 3 s)\n"
    assert len(server.requests) == 1


def test_a_server_that_is_not_there() -> None:
    result = CliRunner().invoke(complete, ["p", "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: cannot connect to http://127.0.0.1:1: .* `shoal serve` starts one\)\n", result.stderr)


def test_a_bad_url() -> None:
    result = CliRunner().invoke(complete, ["p", "--url", "localhost:8000"])
    assert result.exit_code == 1
    assert result.stderr == "Error: base_url must start with http:// or https://, not be 'localhost:8000'\n"


def test_an_error_in_the_middle_keeps_what_came(server: FakeServer, shell: Any) -> None:
    server.stream(completion_chunks("partial")[0], error_body("the engine failed", type="server_error"))
    result = shell(complete, "p")
    assert (result.exit_code, result.stdout) == (1, "partial")
    assert result.stderr == "Error: the engine failed\n"


def test_an_answer_without_text_or_usage(server: FakeServer, shell: Any) -> None:
    server.stream()
    result = shell(complete, "p")
    assert (result.exit_code, result.stdout) == (0, "")
    assert re.fullmatch(r"\[\d+\.\d\d s\]\n", result.stderr)


@pytest.mark.parametrize(("command", "args"), [(complete, ["p"]), (chat, ["--max-tokens", "9"])])
def test_ctrl_c_is_exit_code_130(
    shell: Any, monkeypatch: pytest.MonkeyPatch, command: click.Command, args: list[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clients.ShoalClient, "stream_complete", interrupted)
    monkeypatch.setattr(clients.ShoalClient, "stream_chat", interrupted)
    assert shell(command, *args, stdin="hello\n").exit_code == 130


def test_chat_remembers(server: FakeServer, shell: Any) -> None:
    server.stream(*chat_chunks("Hel", "lo!"))
    server.stream(*chat_chunks("Fine."))
    result = shell(chat, "--max-tokens", "9", "--seed", "1", "--system", "Be brief.", stdin="Hi\n\n  How are you?  \n")
    assert result.exit_code == 0
    assert result.stdout == "Hello!\nFine.\n"
    assert result.stderr.count("tokens/s") == 2
    first, second = (seen.body for seen in server.requests)
    system = {"role": "system", "content": "Be brief."}
    assert first["messages"] == [system, {"role": "user", "content": "Hi"}]
    assert second["messages"] == [
        system,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "How are you?"},
    ]
    assert first["seed"] == second["seed"] == 1
    assert first["max_tokens"] == second["max_tokens"] == 9


@pytest.mark.parametrize(
    ("contexts", "args", "max_tokens"),
    [
        ([4096], [], 512),
        ([1024], [], 256),
        ([None], [], 512),
        ([], [], 512),
        ([1024, 800], ["--model", "served-1"], 200),
    ],
    ids=["long context", "short context", "unknown context", "no model", "the second model"],
)
def test_the_answers_of_a_chat_are_bounded(
    server: FakeServer, shell: Any, contexts: list[int | None], args: list[str], max_tokens: int
) -> None:
    served = [{"id": f"served-{i}", "created": 1, "max_model_len": length} for i, length in enumerate(contexts)]
    server.json({"object": "list", "data": served})
    server.stream(*chat_chunks("ok"))
    result = shell(chat, *args, stdin="Hi")
    assert result.exit_code == 0, result.stderr
    assert [seen.path for seen in server.requests] == ["/v1/models", "/v1/chat/completions"]
    assert server.requests[1].body["max_tokens"] == max_tokens


def test_a_full_context_loses_its_oldest_turns(server: FakeServer, shell: Any) -> None:
    """Only for a turn that then succeeds, and never the system message."""
    for answer in ("1", "2"):
        server.stream(*chat_chunks(answer))
    server.error(400, "too long", code="context_length_exceeded")
    server.stream(*chat_chunks("3"))
    for _ in range(3):
        server.error(400, "far too long", code="context_length_exceeded")
    result = shell(chat, "--max-tokens", "9", "--system", "S", stdin="one\ntwo\nthree\nfour")
    assert (result.exit_code, result.stdout) == (1, "1\n2\n3\n")
    assert result.stderr.count("forgotten") == 1
    assert "[the context is full: the oldest turns are forgotten, 1 of 2]" in result.stderr
    assert result.stderr.endswith("Error: far too long\n")
    assert [[m["content"] for m in seen.body["messages"]] for seen in server.requests] == [
        ["S", "one"],
        ["S", "one", "1", "two"],
        ["S", "one", "1", "two", "2", "three"],
        ["S", "two", "2", "three"],
        ["S", "two", "2", "three", "3", "four"],
        ["S", "three", "3", "four"],
        ["S", "four"],
    ]


def test_chat_commands(server: FakeServer, shell: Any) -> None:
    for _ in range(4):
        server.stream(*chat_chunks("ok"))
    commands = "one|/reset|two|/system  Rhyme.|three|/system|/reset|four|/what|/help|/quit|five"
    result = shell(chat, "--max-tokens", "9", stdin=commands.replace("|", "\n"))
    assert result.exit_code == 0
    assert [[m["content"] for m in seen.body["messages"]] for seen in server.requests] == [
        ["one"],
        ["two"],
        ["Rhyme.", "two", "ok", "three"],
        ["four"],
    ]
    assert "There is no command /what" in result.stderr
    for command in ("/help", "/reset", "/system", "/quit"):
        assert f"\n{command} " in result.stderr
    assert result.stdout == "ok\n" * 4


@pytest.mark.parametrize("command", [complete, chat])
def test_help_names_every_option(command: click.Command) -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    for option in ("--url", "--api-key", "--model", "--max-tokens", "--temperature", "--seed", "--stop"):
        assert option in result.stdout
    assert "SHOAL_URL" in result.stdout
    assert "SHOAL_API_KEY" in result.stdout
