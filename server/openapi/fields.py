"""What the fields of requests mean, in the words of docs/api.md; types, limits and defaults are those of the types.

A name may have the type before it where fields of one name differ.  It holds for types that extend that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FIELDS: Mapping[str, str] = {
    # completions and chats
    "model": "one of the names of the served model; another one is a 404, unless `any_model` is set",
    "n": "choices for each prompt; the first samples with `seed`, each other one with a hash of `seed` and its number",
    "max_tokens": "most tokens of a choice; 0 computes the prompt only, -1 is as many as fit",
    "temperature": "0 takes the most probable token",
    "top_p": "keeps the smallest set of most probable tokens whose probability reaches this",
    "top_k": "keeps the k most probable tokens; 0 and -1 keep all",
    "min_p": "drops tokens that are less probable than this share of the most probable one",
    "top_n_sigma": "keeps tokens whose logit is at most this many standard deviations of the logits below the "
    "greatest; 0 and less keep all",
    "typical_p": "keeps the smallest set of tokens whose surprise is nearest to the entropy and whose probability "
    "reaches this",
    "xtc_probability": "how often `xtc_threshold` takes effect: at which tokens depends on `seed`",
    "xtc_threshold": "drops all tokens that are at least so probable, except for the least probable of them; above 0.5 "
    "drops none",
    "repetition_penalty": "over prompt and output tokens; 1 is none",
    "presence_penalty": "OpenAI's, over output tokens",
    "frequency_penalty": "OpenAI's, over output tokens",
    "logit_bias": "is added to the logits of these tokens",
    "seed": "the same request with the same seed gives the same tokens; taken modulo 2^64",
    "stop": "the text ends before the first of them",
    "stop_token_ids": "the text ends before the first of them",
    "ignore_eos": "the model's own end-of-text tokens do not end the text",
    "min_tokens": "no end-of-text or stop token is chosen before this many tokens; stop strings may still end the text",
    "allowed_token_ids": "no others are chosen",
    "bad_words": "the text does not have these words: the last token of one is not chosen behind its others",
    "logprob_token_ids": "with `logprobs`: these tokens stand in the place of the most probable ones, in this order, "
    "beside each generated token",
    "include_stop_str_in_output": "whether the stop string or token that ends a text stands in it",
    "skip_special_tokens": "whether special tokens are left out of the text",
    "truncate_prompt_tokens": "a longer prompt keeps its last tokens, this many; -1: as many as the context leaves",
    "add_special_tokens": "whether a text gets the model's begin-of-text token; one that it begins with is not doubled",
    "return_token_ids": "choices have `token_ids`, and the answer `prompt_token_ids` (of completions the choices)",
    "return_tokens_as_token_ids": "log-probabilities name tokens as `token_id:5`",
    "prompt_logprobs": "log-probabilities of the prompt's tokens, in vLLM's form; not in streams",
    "request_id": "stands in the header `x-request-id` of the answer",
    "stream": "send tokens as they come",
    "stream_options": 'only with `stream`; `{"include_usage": true}` adds the usage to the stream, '
    '`"continuous_usage_stats": true` to each chunk',
    "stream_interval": "tokens of a stream's event, after the first token, which comes alone",
    "user": "the client, for the policy `fair`, where the server asks for no key",
    "priority": "for the policy `priority`: lower goes first",
    "timeout": "seconds in which the request must be finished",
    "cache_salt": "the prefix cache is shared only among requests with the same salt, and the same API key",
    "ttft_slo_ms": "for the policy `deadline`: wanted time to the first token",
    "tpot_slo_ms": "for the policy `deadline`: wanted time for each further token",
    "speculation": '`"off"` does without; another method than the server\'s is refused',
    "timing": "the answer ends with how it was served",
    "receipt": "the answer carries what `shoal replay` needs to have it again, token for token",
    "end_after": "for load tests: the model chooses end-of-text as exactly this output token",
    # completions
    "CompletionBody.prompt": "one or more prompts, none of them empty; tokens are taken as they are, and text gets the "
    "model's begin-of-text token",
    "CompletionBody.echo": "each text begins with its prompt; with `logprobs` the prompt is scored too",
    "CompletionBody.logprobs": "log-probabilities of each token, and of this many most probable tokens in its place",
    "best_of": "any other number is refused",
    "suffix": "what follows the text: the model fills in the middle, where its vocabulary has the tokens for it (Qwen "
    "Coder, StarCoder, DeepSeek Coder, ...), else a text is refused; not beside `echo`, `prompt_logprobs` and "
    "`truncate_prompt_tokens`",
    # chats
    "messages": "the conversation, which the model's chat template turns into a prompt",
    "ChatBody.parse_special": "whether special tokens that messages spell (`<|end|>`) become those tokens; else they "
    "are text, so that no message can forge a turn",
    "max_completion_tokens": "another name for `max_tokens`; it wins if both are given",
    "ChatBody.logprobs": "log-probabilities of each token",
    "top_logprobs": "log-probabilities of this many most probable tokens too; needs `logprobs`",
    "ChatBody.tools": "functions that the model may call",
    "tool_choice": "whether the model may call tools, has to, has to call this one, or may or has to call some of them",
    "parallel_tool_calls": "whether an answer may have several calls",
    "reasoning_effort": 'is passed on to the chat template; `"none"` sets `enable_thinking` to false too',
    "chat_template_kwargs": "further variables of the chat template, such as `enable_thinking`",
    "include_reasoning": "false leaves thoughts out of the answer",
    "documents": "are given to the chat template",
    "chat_template": "a Jinja template in place of the model's; it runs where that one runs",
    "add_generation_prompt": "whether the prompt ends with what opens the assistant's message",
    "continue_final_message": "the answer goes on with the last message, which is the assistant's; "
    "`add_generation_prompt` has to be false",
    "ChatBody.echo": "an answer that goes on with a message of the assistant begins with it",
    "functions": "an answer has `function_call` in the place of `tool_calls`",
    "modalities": "any other one is refused",
    # messages of chats, and tools
    "Message.role": "`developer` is passed on as `system`, `function` as `tool`",
    "Message.content": "several parts are joined without anything between them",
    "Message.name": "is passed on to the chat template",
    "Message.tool_calls": "what the assistant called",
    "Message.tool_call_id": "of the role `tool`: the `id` of the call whose result this is",
    "Message.reasoning_content": "is passed on to the chat template as `reasoning_content`",
    "Message.reasoning": "is passed on to the chat template as `reasoning_content`",
    "Message.function_call": "a call as it was before `tool_calls`",
    "FunctionDefinition.name": "no two tools have the same",
    "FunctionDefinition.description": "is shown to the model",
    "FunctionDefinition.parameters": "of the arguments",
    "FunctionDefinition.strict": 'with `"auto"`: if the model calls this tool, its arguments match the schema',
    # responses
    "ResponsesBody.input": "a string is a message of the user",
    "instructions": "the system message; it does not go on to the next turn",
    "previous_response_id": "the conversation of this response goes on",
    "max_output_tokens": "most tokens of the answer, its thoughts included",
    "ResponsesBody.text": "`verbosity` is ignored",
    "ResponsesBody.tools": "any other type is refused",
    "ResponsesBody.reasoning": "`effort` as `reasoning_effort` of chats; `summary` is ignored, for thoughts come whole",
    "ResponsesBody.include": "`message.output_text.logprobs` is the one that adds something",
    "ResponsesBody.top_logprobs": "most probable alternatives at each place, if log-probabilities are included",
    "truncation": '`"auto"` drops messages from the beginning until the rest fits; what is left begins with a user\'s '
    "message",
    "ResponsesBody.stream": "send events as they come",
    "ResponsesBody.stream_options": "only with `stream`; `include_obfuscation` is ignored: no event is padded",
    "background": "answer at once, and make the response meanwhile",
    "ResponsesBody.store": "keep the response for later",
    "ResponsesBody.metadata": "comes back in the answer",
    "FunctionTool.name": "no two tools have the same",
    "FunctionTool.description": "is shown to the model",
    "FunctionTool.parameters": "of the arguments",
    "FunctionTool.strict": 'with `"auto"`: if the model calls this tool, its arguments match the schema',
    # Anthropic's messages
    "CountBody.system": "the system prompt; a block that begins with `x-anthropic-billing-header` is left out, since "
    "it differs in each request",
    "CountBody.tools": "tools that the client runs; those of Anthropic's servers, such as `web_search_20250305`, are "
    "refused",
    "CountBody.tool_choice": 'as in chats, where `"any"` is `"required"`',
    "CountBody.thinking": "sets `enable_thinking` and `thinking` of the chat template; `budget_tokens` and `display` "
    "are taken and change nothing",
    "output_config": "the answer keeps to the schema; `effort` is passed on to the chat template as `reasoning_effort`",
    "output_format": "the answer keeps to the schema",
    "context_management": "taken where its `edits` keep all",
    "CountBody.cache_control": "accepted and ignored",
    "CountBody.diagnostics": "accepted and ignored",
    "CountBody.speed": "accepted and ignored",
    "MessagesBody.max_tokens": "most tokens of the answer; where the context ends before, the answer does",
    "stop_sequences": "as in chats, where `stop_sequences` are `stop`",
    "MessagesBody.metadata": "for the scheduling policy, as `user`",
    "MessagesBody.service_tier": "accepted and ignored",
    "inference_geo": "accepted and ignored",
    "user_profile_id": "accepted and ignored",
    "CustomTool.description": "is shown to the model",
    "input_schema": "of the input",
    # embeddings
    "EmbeddingsBody.input": "one input, or 1 to 2,048 of them, none empty; tokens are taken as they are, and text gets "
    "what the tokenizer puts around it",
    "encoding_format": "numbers, or little-endian float32 in base64, for which OpenAI's Python client asks by itself",
    "dimensions": "so many of a vector's first numbers stay, and then its length is made 1; it says less unless the "
    "model was trained for it",
    "EmbeddingsBody.truncate_prompt_tokens": "so many tokens are kept of each input, the first, and those that the "
    "tokenizer puts around a text; -1 is `max_model_len`",
    # grammars
    "guided_json": "as vLLM had it",
    "guided_regex": "as vLLM had it",
    "guided_choice": "as vLLM had it",
    "guided_grammar": "as vLLM had it",
    "guided_whitespace_pattern": "what may stand between the tokens of `guided_json`",
    "guided_decoding_backend": "ignored, since there is one backend",
    "grammar": "as llama.cpp has it",
    "json_schema": "as llama.cpp has it",
    "regex": "as SGLang has it",
    "ebnf": "as SGLang has it",
    "structured_outputs": "as vLLM has it",
    # batches
    "input_file_id": "an uploaded file",
    "endpoint": "what each line asks",
    "completion_window": "the batch expires so long after it was made",
    "BatchBody.metadata": "comes back with the batch",
    # plans
    "PlanBody.config": "a model's `config.json`; that of the served model if not given",
    "machine": "the chip that computes, by its data sheet; `auto` is this machine, which is measured for a second",
    "context": "tokens of a sequence; 4096 if not given, or as many as the model can have",
    "batch": "most sequences of a step",
    "tp": "tensor-parallel ranks, which share each matrix",
    "ep": "expert-parallel ranks, which share the experts",
    "pp": "pipeline stages, each of which has layers of its own",
    # tokens
    "TokenizeBody.prompt": "the text; give either this or `messages`",
    "TokenizeBody.messages": "a conversation",
    "TokenizeBody.add_special_tokens": "whether the text gets the begin-of-text token",
    "DetokenizeBody.tokens": "special tokens are written out",
}


def meaning(kinds: Iterable[str], name: str) -> str | None:
    """What a field means, if that is said.

    Args:
        kinds: its type, and those that the type extends.
    """
    return next((FIELDS[f"{kind}.{name}"] for kind in kinds if f"{kind}.{name}" in FIELDS), FIELDS.get(name))
