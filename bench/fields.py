"""Which request fields of vLLM and of OpenAI's API does this server not know?

    python -m bench.fields vllm/entrypoints/openai

reads the request types in a copy of vLLM's source, and those of the installed openai package.  A
field that is missing here would be ignored in silence: put it in llmsrv/api/openai/schema.py, as
supported, unsupported or without effect.
"""

import ast
import sys
import typing
from pathlib import Path

from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.api.openai.schema import CompletionRequest
from llmsrv.api.openai.schema import IGNORED
from llmsrv.api.openai.schema import UNSUPPORTED

REQUESTS = {
    "ChatCompletionRequest": (
        ChatCompletionRequest,
        chat_create_params.CompletionCreateParamsStreaming,
        "chat_completion/protocol.py",
    ),
    "CompletionRequest": (
        CompletionRequest,
        completion_create_params.CompletionCreateParamsStreaming,
        "completion/protocol.py",
    ),
}


def fields_of_class(source: str, name: str) -> set[str]:
    """The public annotated names of a class, without importing its module."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    (body,) = [node.body for node in classes if node.name == name]
    targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def unknown_fields(request: str, fields: set[str]) -> set[str]:
    """Those of `fields` that the request's type here does not have, and no list either."""
    return fields - {*REQUESTS[request][0].__struct_fields__, *UNSUPPORTED, *IGNORED}


def openai_fields(request: str) -> set[str]:
    return set(typing.get_type_hints(REQUESTS[request][1]))


def main(vllm: Path) -> int:
    num_unknown = 0
    for request, (_, _, path) in REQUESTS.items():
        source = (vllm / path).read_text()
        for whose, fields in (
            ("vLLM", fields_of_class(source, request)),
            ("OpenAI", openai_fields(request)),
        ):
            unknown = unknown_fields(request, fields)
            num_unknown += len(unknown)
            print(f"{request}: {len(fields)} fields of {whose}, unknown: {sorted(unknown)}")
    return 1 if num_unknown else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
