"""Chat templates with the shapes of published ones: what they refuse, drop and demand, in texts of
our own.
"""

from dataclasses import dataclass
from dataclasses import field
from typing import Any

from llmsrv.text.template_probe import Arguments
from llmsrv.text.template_probe import CallIds


@dataclass(frozen=True)
class Shape:
    """facts: those that differ from the defaults of TemplateFacts."""

    source: str
    facts: dict[str, Any] = field(default_factory=dict)


TOOLS_FIRST = "{% if tools %}[tools {{ tools | tojson }}]\n{% endif %}"
ANSWER = "{% if add_generation_prompt %}[assistant]{% endif %}"
ALTERNATE = (
    "{% set ns = namespace(n=0) %}{% for m in rest %}"
    "{% if m.role in ['user', 'assistant'] and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}"
)
SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}"
)
NINE = (
    "{% if c.id | length != 9 %}{{ raise_exception('ids must have nine characters') }}{% endif %}"
)
CALLS = (
    "{% for c in m.tool_calls %}[call {{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}\n"
)
PARTS_ONLY = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}" + ANSWER
)

SHAPES: dict[str, Shape] = {
    # Qwen 2.5: takes everything
    "qwen2.5": Shape(
        TOOLS_FIRST + "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content }}"
        "{% if m.tool_calls %}" + CALLS + "{% endif %}{{ '\n' }}{% endfor %}" + ANSWER,
        {"has_tools": True},
    ),
    # Qwen 3: looks into the content of every assistant
    "qwen3": Shape(
        TOOLS_FIRST + "{% for m in messages %}[{{ m.role }}]"
        "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}"
        "{% if m.tool_calls %}" + CALLS + "{% endif %}{{ '\n' }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        + ANSWER,
        {"has_tools": True, "takes_null_content": False, "switches": ("enable_thinking",)},
    ),
    # Some QwQ: prints None
    "qwq": Shape(
        TOOLS_FIRST + "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.tool_calls %}" + CALLS + "{% endif %}{{ '\n' }}{% endfor %}" + ANSWER,
        {"has_tools": True, "takes_null_content": False},
    ),
    # Qwen 3.8: one system message; iterates over arguments
    "qwen3.8": Shape(
        TOOLS_FIRST + "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
        "[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "<function={{ c.function.name }}>{% for key, value in c.function.arguments | items %}"
        "<parameter={{ key }}>{{ value }}</parameter>{% endfor %}</function>{% endfor %}"
        "{{ '\n' }}{% endfor %}" + ANSWER,
        {"has_tools": True, "takes_late_system": False, "arguments": Arguments.OBJECT},
    ),
    # Qwen 3.6 and GLM 4.6: drop arguments that are a string without a word
    "qwen3.6": Shape(
        TOOLS_FIRST + "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>"
        "{% if c.function.arguments is mapping %}{% for key in c.function.arguments %}"
        "<parameter={{ key }}>{{ c.function.arguments[key] }}</parameter>{% endfor %}{% endif %}"
        "</function>{% endfor %}{{ '\n' }}{% endfor %}" + ANSWER,
        {"has_tools": True, "arguments": Arguments.OBJECT},
    ),
    # Gemma 2: refuses a system role; roles alternate; no tools
    "gemma2": Shape(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% set rest = messages %}" + ALTERNATE +
        "{% for m in messages %}[{{ 'model' if m.role == 'assistant' else m.role }}]"
        "{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}[model]{% endif %}",
        {
            "has_system_role": False, "takes_late_system": False, "takes_repeated_roles": False,
        },
    ),
    # Mistral 0.1: the same, with other words
    "mistral0.1": Shape(
        "{% set rest = messages %}" + ALTERNATE + "{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}</s>"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}{% endfor %}",
        {
            "has_system_role": False, "takes_late_system": False, "takes_repeated_roles": False,
        },
    ),
    # Phi-3, the first: drops a system message without a word
    "phi3": Shape(
        "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}\n"
        "{% elif m.role == 'assistant' %}[assistant]{{ m.content }}\n{% endif %}{% endfor %}"
        + ANSWER,
        {"has_system_role": False, "takes_late_system": False},
    ),
    # DeepSeek R1's distillations: keep the last system message only; no tools
    "r1": Shape(
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ ns.system }}"
        "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}"
        "{% elif m.role == 'assistant' and m.content is not none %}[assistant]{{ m.content }}"
        "{% endif %}{% endfor %}" + ANSWER,
        {"takes_late_system": False},
    ),
    # Mistral Nemo: ids of nine characters; the system message only with a last user message
    "nemo": Shape(
        SPLIT_SYSTEM + ALTERNATE
        + "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in rest %}{% if m.role == 'user' %}"
        "{% if tools and m == users[-1] %}{{ tools | tojson }}{% endif %}[INST]"
        "{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}"
        "{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}" + NINE +
        "{{ c.function | tojson }}{{ c.id }}{% endfor %}]</s>"
        "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}"
        "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
        "{{ raise_exception('ids must have nine characters') }}{% endif %}"
        "[TOOL_RESULTS]{{ m.content }} {{ m.tool_call_id }}[/TOOL_RESULTS]"
        "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}",
        {
            "has_tools": True, "keeps_system_after_result": False, "takes_late_system": False,
            "takes_repeated_roles": False, "takes_user_after_result": False,
            "call_ids": CallIds.NINE,
        },
    ),
    # Llama 3.1: one call a message; tools in the first user message
    "llama3.1": Shape(
        SPLIT_SYSTEM + "[system]{{ system }}\n{% if tools %}[user]{{ tools | tojson }}"
        "{{ rest[0].content | trim }}\n{% set rest = rest[1:] %}{% endif %}"
        "{% for m in rest %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
        "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
        "{% set f = m.tool_calls[0].function %}[assistant]"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}\n'
        "{% elif m.role == 'tool' %}[ipython]{{ m.content | tojson }}\n"
        "{% else %}[{{ m.role }}]{{ m.content | trim }}\n{% endif %}{% endfor %}" + ANSWER,
        {"has_tools": True, "takes_several_calls": False},
    ),
    # gpt-oss: shows the first call only; looks into the content; drops later system messages
    "gpt-oss": Shape(
        SPLIT_SYSTEM + "{{ system }}" + TOOLS_FIRST + "{% for m in rest %}"
        "{% if m.role == 'assistant' %}{% if '<|channel|>' in m.content %}"
        "{{ raise_exception('no channels') }}{% endif %}{% if m.tool_calls %}"
        "{% set f = m.tool_calls[0].function %}[{{ f.name }}]{{ f.arguments | tojson }}"
        "{% else %}[final]{{ m.content }}{% endif %}"
        "{% elif m.role == 'tool' %}[result]{{ m.content | tojson }}"
        "{% elif m.role == 'user' %}[user]{{ m.content }}{% endif %}{% endfor %}" + ANSWER,
        {
            "has_tools": True, "takes_late_system": False, "takes_null_content": False,
            "takes_several_calls": False,
        },
    ),
    # DeepSeek V3: arguments are strings; calls only in messages without content
    "deepseek-v3": Shape(
        TOOLS_FIRST + "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
        "{% for c in m.tool_calls %}{{ '[call ' + c.function.name + ' ' + c.function.arguments }}]"
        "{% endfor %}{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}" + ANSWER,
        {
            "has_tools": True, "takes_calls_with_content": False, "arguments": Arguments.STRING,
        },
    ),
    # A template that prints arguments as they are: objects come out in Python's spelling
    "printed": Shape(
        TOOLS_FIRST + "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
        "{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments }}{% endfor %}"
        "{% endfor %}" + ANSWER,
        {"has_tools": True, "arguments": Arguments.STRING},
    ),
    # Granite 3.3: shows tools and results, but no calls
    "granite3.3": Shape(
        "{# <|tool_call|> #}" + TOOLS_FIRST
        + "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}\n{% endfor %}" + ANSWER,
        {"has_tools": True, "has_calls": False},
    ),
    # Kimi K2: shows the id of a call in place of its name
    "kimi": Shape(
        TOOLS_FIRST + "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.id }}<args>{{ c.function.arguments | tojson }}"
        "{% endfor %}{% if m.role == 'tool' %} of {{ m.tool_call_id }}{% endif %}{% endfor %}"
        + ANSWER,
        {"has_tools": True, "call_ids": CallIds.FUNCTION},
    ),
    # Vision models: content is a list of parts
    "vision": Shape(PARTS_ONLY, {"needs_parts": True}),
    # Phi-4-mini: tools within the system message only
    "phi4-mini": Shape(
        "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content }}"
        "{% if m.role == 'system' and tools %}{{ tools | tojson }}{% endif %}"
        "{% if m.tool_calls %}" + CALLS + "{% endif %}{% endfor %}" + ANSWER,
        {"has_tools": True, "needs_system_for_tools": True},
    ),
    # Hermes and Command R with tools: iterate over tools also where there are none
    "hermes": Shape(
        "<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
        "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
        "{% if m.tool_calls %}" + CALLS + "{% endif %}{{ '\n' }}{% endfor %}" + ANSWER,
        {"has_tools": True, "needs_tools_list": True},
    ),
    # Devstral: content without a string is a list
    "devstral": Shape(
        SPLIT_SYSTEM + "{{ system }}" + TOOLS_FIRST + "{% for m in rest %}"
        "{% if m.role == 'system' %}{{ raise_exception('one system message') }}{% endif %}"
        "[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
        "{{ m.content[0].text }}{% endif %}{% if m.tool_calls %}" + CALLS + "{% endif %}"
        "{% endfor %}",
        {"has_tools": True, "takes_late_system": False, "takes_null_content": False},
    ),
}
