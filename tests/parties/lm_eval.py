"""lm-eval's log-likelihoods, which have to be those of transformers: https://github.com/EleutherAI/lm-evaluation-harness."""

import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from party import BASE_URL, MODEL, MODEL_FOLDER, check, run

folder = Path(tempfile.mkdtemp())
QUESTIONS = [
    {"query": "def add(a, b):\n    return", "choices": ["a + b", "a - b", "os"], "gold": 0},
    {"query": "import os\n\nprint(os.path", "choices": ["join('a')", "exists", "größer"], "gold": 1},
    {"query": "Once upon a time, there was a", "choices": ["little girl", "quantum", "the"], "gold": 0},
    {"query": "for i in range(10):", "choices": ["print(i)", "pass", "楽しい"], "gold": 0},
]
(folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
(folder / "choose.yaml").write_text(f"""
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
(folder / "read.yaml").write_text(f"""
task: read
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{query}}}} {{{{choices[0]}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
""")
(folder / "write.yaml").write_text(f"""
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
""")
tasks = TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: str, arguments: dict[str, Any], task: str) -> tuple[Any, list[Any]]:
    """Metrics of a task, and what the model answered to each question."""
    found: Any = lm_eval.simple_evaluate(
        model, model_args=arguments, tasks=[task], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    return found["results"][task], [sample["resps"] for sample in found["samples"][task]]


def of_transformers(task: str) -> tuple[Any, list[Any]]:
    return evaluate("hf", {"pretrained": MODEL_FOLDER, "dtype": "float32", "device": "cpu"}, task)


def of_shoal(task: str, **options: Any) -> tuple[Any, list[Any]]:
    """With the first token that the tokenizer puts before texts, which transformers has; it would count without."""
    arguments = {"model": MODEL, "base_url": f"{BASE_URL}/completions", "tokenizer": MODEL_FOLDER, "max_retries": 1}
    arguments |= {"add_bos_token": True, "num_concurrent": 2, "max_length": 1024}
    return evaluate("local-completions", arguments | options, task)


def flat(found: Any) -> list[Any]:
    return [one for part in found for one in flat(part)] if isinstance(found, list | tuple) else [found]


def check_same(found: tuple[Any, list[Any]], expected: tuple[Any, list[Any]]) -> None:
    """Equal up to the rounding of sums in another order."""
    for one, other in zip(flat(found[1]), flat(expected[1]), strict=True):
        if isinstance(other, float):
            assert abs(one - other) < 1e-3 * max(1, abs(other)), (one, other)
        else:
            assert one == other, (one, other)
    for name, value in expected[0].items():
        assert isinstance(value, str) or abs(found[0][name] - value) < 1e-3 * max(1, abs(value)), (
            name,
            found[0],
            value,
        )


@check
def log_likelihoods_of_tokens() -> None:
    check_same(of_shoal("choose"), of_transformers("choose"))


@check
def log_likelihoods_of_texts() -> None:
    check_same(of_shoal("choose", tokenized_requests=False), of_transformers("choose"))


@check
def log_likelihoods_several_at_a_time() -> None:
    check_same(of_shoal("choose", batch_size=4, num_concurrent=1), of_transformers("choose"))


@check
def log_likelihoods_of_whole_texts() -> None:
    check_same(of_shoal("read"), of_transformers("read"))


@check
def texts() -> None:
    check_same(of_shoal("write"), of_transformers("write"))


@check
def texts_of_chats() -> None:
    arguments = {"model": MODEL, "base_url": f"{BASE_URL}/chat/completions", "max_retries": 1}
    found: Any = lm_eval.simple_evaluate(
        "local-chat-completions",
        model_args=arguments,
        tasks=["write"],
        task_manager=tasks,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found["results"]["write"]["sample_len"] == len(QUESTIONS)


run()
