"""The clients: a record for each, and its script beside this file.

None is left untried.  inference-perf needs `python3.12` (of pyenv's, `PYENV_VERSION` says which it is), and promptfoo
Node 22, which npm has as a package.  `vllm bench serve` comes with vLLM alone, a wheel of 336 MB: its row has what it
imports, with another torch than vLLM asks for, for processors only.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent


class Party(NamedTuple):
    """A client.

    Attributes:
        name: of its environment.
        requirements: exact ones, for pip or for npm, of which the first is the client itself.
        script_name: of the script beside this file; the client's name if not given.
        program: of the machine that is needed too: another Python, which then runs the client, or a browser.
        is_bare: it needs little of what it asks for: pip installs the client without its dependencies, and npm
            leaves out optional ones; the other requirements are what it needs of them.
    """

    name: str
    requirements: tuple[str, ...]
    script_name: str = ""
    program: str = ""
    is_bare: bool = False

    @property
    def is_node(self) -> bool:
        return self.name.startswith("node_")

    @property
    def script(self) -> Path:
        return FOLDER / f"{self.script_name or self.name}{'.mjs' if self.is_node else '.py'}"

    @property
    def version(self) -> str:
        return self.requirements[0].replace("==", "@").rpartition("@")[2]


OPENAI, PYDANTIC = "openai==3.57.0", "pydantic==2.14.4"
PARTIES = (
    Party("openai_1", ("openai==1.109.1", PYDANTIC), "openai"),
    Party("openai_2", ("openai==2.54.0", PYDANTIC), "openai"),
    Party("openai_3", (OPENAI, PYDANTIC), "openai"),
    Party("litellm", ("litellm==1.110.2", OPENAI, PYDANTIC)),
    Party("litellm_anthropic", ("litellm==1.110.2", PYDANTIC)),
    Party("langchain", ("langchain==1.5.2", "langchain-openai==1.7.4", "langgraph==1.2.24", OPENAI, PYDANTIC)),
    Party(
        "llama_index",
        (
            *("llama-index-core==0.14.25", "llama-index-llms-openai-like==0.8.1"),
            *("llama-index-embeddings-openai-like==0.4.0", "openai==2.54.0", PYDANTIC),
        ),
    ),
    Party("instructor", ("instructor==1.17.0", "openai==3.3.0", PYDANTIC)),
    Party("pydantic_ai", ("pydantic-ai-slim[openai]==2.68.0", OPENAI, PYDANTIC)),
    Party("openai_agents", ("openai-agents==0.24.0", OPENAI, PYDANTIC)),
    Party("openai_agents_responses", ("openai-agents==0.24.0", OPENAI, PYDANTIC)),
    Party("smolagents", ("smolagents[openai]==1.26.0", OPENAI, PYDANTIC)),
    Party("outlines", ("outlines==1.3.3", OPENAI, PYDANTIC)),
    Party("autogen", ("autogen-agentchat==0.7.5", "autogen-ext[openai]==0.7.5", OPENAI, PYDANTIC)),
    Party("haystack", ("haystack-ai==3.4.1", OPENAI, PYDANTIC)),
    Party("agno", ("agno==3.1.10", OPENAI, PYDANTIC)),
    Party("strands", ("strands-agents[openai]==1.62.0", "openai==2.54.0", PYDANTIC)),
    Party("magentic", ("magentic==0.41.1", OPENAI, PYDANTIC)),
    Party("dspy", ("dspy==3.4.1", "numpy==2.4.6", PYDANTIC)),
    Party("llm", ("llm==0.36", OPENAI, PYDANTIC)),
    Party("lm_eval", ("lm_eval[api]==0.4.13", "accelerate==1.15.0", "transformers==5.24.0", "torch==2.13.0")),
    Party("guidellm", ("guidellm==0.8.1", "torch==2.13.0")),
    Party("evalscope", ("evalscope[perf]==1.14.1",)),
    Party("inference_perf", ("inference-perf==0.7.0",), program="python3.12"),
    Party("aiperf", ("aiperf==0.13.0",)),
    Party(
        "vllm",
        (
            *("vllm==0.33.0", "torch==2.13.0", "transformers==5.16.1", OPENAI, PYDANTIC),
            *("aiohttp==3.14.5", "blake3==1.0.11", "cachetools==8.0.2", "cbor2==6.3.0", "cloudpickle==3.1.3"),
            *("einops==0.8.2", "fastapi==0.165.0", "llguidance==1.9.1", "msgspec==0.23.0", "orjson==3.13.0"),
            *("oss-harmony==0.0.11", "partial-json-parser==0.2.1.1.post7", "pillow==13.0.0"),
            *("prometheus_client==0.26.0", "psutil==7.2.2", "py-cpuinfo==9.0.0", "pybase64==1.5.1", "pyzmq==27.3.0"),
            *("regex==2026.11.19", "requests==2.34.2", "uvicorn==0.54.0", "uvloop==0.23.0", "watchfiles==1.3.0"),
            *("xgrammar==0.2.9",),
        ),
        is_bare=True,
    ),
    Party("node_openai", ("openai@6.49.0", "zod@4.6.7")),
    Party("node_browser", ("openai@6.49.0",), program="chromium"),
    Party("node_anthropic", ("@anthropic-ai/sdk@1.14.0", "zod@4.6.7")),
    Party("node_ai_anthropic", ("ai@7.0.173", "@ai-sdk/anthropic@4.0.105", "zod@4.6.7")),
    Party("node_ai", ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7")),
    Party("node_ai_openai", ("ai@6.0.326", "@ai-sdk/openai@3.0.141", "zod@4.6.7")),
    Party("node_promptfoo", ("promptfoo@0.123.1", "node@24.19.0", "@libsql/linux-x64-gnu@0.5.29"), is_bare=True),
)
