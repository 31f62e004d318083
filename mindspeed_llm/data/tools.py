"""How tools, and calls of tools, are spelled in a conversation: one class per `tool_format` of a template.

`default` is the plain-text form of templates that know no tools; `qwen` (also written `qwen3`) that of Qwen2.5 and
Qwen3, `ling` the same within Ling's tags, `glm4` that of GLM-4 and `glm4_moe` that of GLM-4.5. The spellings are those
of the chat templates which the models carry.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mindspeed_llm.data.messages import Call
from mindspeed_llm.errors import lookup


class ToolFormat(Protocol):
    """A spelling of tools and calls."""

    own_block: bool  # tools stand in a system block of their own, before the system text
    wraps_calls: bool  # calls are text of the answer; else the template's function format lays each of them out

    def tools_text(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> list[tuple[str, bool]]:
        """What tells a model of its tools: (text, whether it comes from the data). `after_text`: a system text stands
        before it. Raises KeyError or TypeError for tools that are none."""

    def calls_text(self, calls: Sequence[Call]) -> str:
        """Calls as the model writes them."""


class PlainTools:
    """Tools described in sentences; a call is `Action: name` and `Action Input: arguments`."""

    own_block = False
    wraps_calls = False

    def tools_text(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> list[tuple[str, bool]]:
        """The list of tools with their arguments, and how to call one."""
        described = [_described(tool) for tool in map(bare, tools)]
        names = ", ".join(bare(tool)["name"] for tool in tools)
        return [
            ("You have access to the following tools:\n", False),
            ("\n".join(described), True),
            ("\nUse the following format if using a tool:\n```\nAction: tool name (one of [", False),
            (names, True),
            (
                "]).\nAction Input: the input to the tool, in a JSON format representing the kwargs (e.g. "
                '```{"input": "hello world", "num_beams": 5}```).\n```\n',
                False,
            ),
        ]

    def calls_text(self, calls: Sequence[Call]) -> str:
        """The lines of each call."""
        return "\n".join(f"Action: {call['name']}\nAction Input: {arguments_text(call)}" for call in calls)


class TaggedTools:
    """Tools as JSON lines within <tools> tags; a call is JSON within <tool_call> tags (Qwen2.5, Qwen3, Ling)."""

    own_block = False
    wraps_calls = True
    opening = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>"
    )
    closing = (
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
        "<args-json-object>}\n</tool_call>"
    )

    def tools_text(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> list[tuple[str, bool]]:
        """One line per tool, a blank line before all of it where a system text precedes."""
        lines = "".join("\n" + json.dumps(wrapped(tool), ensure_ascii=False) for tool in tools)
        return [("\n\n" if after_text else "", False), (self.opening, False), (lines, True), (self.closing, False)]

    def calls_text(self, calls: Sequence[Call]) -> str:
        """The calls, a line break between them."""
        return "\n".join(
            f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments_text(call)}}}\n</tool_call>'
            for call in calls
        )


class Glm4Tools:
    """Tools as headed, indented JSON; a call is the name, a line break and the arguments (GLM-4)."""

    own_block = False
    wraps_calls = False
    opening = (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
    )

    def tools_text(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> list[tuple[str, bool]]:
        """The model's own introduction, and one section per tool."""
        parts = [("\n\n" if after_text else "", False), (self.opening, False)]
        for tool in map(bare, tools):
            parts.append((f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}", True))
            parts.append(("\n在调用上述函数时，请使用 Json 格式表示调用的参数。", False))
        return parts

    def calls_text(self, calls: Sequence[Call]) -> str:
        """Name and arguments of each call."""
        return "\n".join(f"{call['name']}\n{arguments_text(call)}" for call in calls)


class Glm45Tools(TaggedTools):
    """Tools as JSON lines in a system block of their own; a call lists its arguments within tags (GLM-4.5)."""

    own_block = True
    closing = (
        "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML "
        "format:\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
        "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
    )

    def tools_text(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> list[tuple[str, bool]]:
        """One line per tool, as given."""
        lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        return [(self.opening, False), (lines, True), (self.closing, False)]

    def calls_text(self, calls: Sequence[Call]) -> str:
        """The calls, each argument a key and a value; text stands as it is, other values as JSON."""
        lines = []
        for call in calls:
            lines.append(f"<tool_call>{call['name']}")
            for key, value in arguments_value(call).items():
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                lines += [f"<arg_key>{key}</arg_key>", f"<arg_value>{text}</arg_value>"]
            lines.append("</tool_call>")
        return "\n".join(lines)


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "default": PlainTools(),
    "qwen": TaggedTools(),
    "qwen3": TaggedTools(),
    "ling": TaggedTools(),
    "glm4": Glm4Tools(),
    "glm4_moe": Glm45Tools(),
}


def tool_format(name: str) -> ToolFormat:
    """The format called `name`. Raises UsageError when there is none of that name."""
    return lookup("tool_format", name, TOOL_FORMATS)


def parse_tools(text: str) -> list[Mapping[str, Any]]:
    """The tools of a JSON text. Raises ValueError when it is no list of objects with names."""
    tools = json.loads(text)
    if not isinstance(tools, list):
        raise ValueError("not a list")
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(bare(tool).get("name"), str):
            raise ValueError("a tool without a name")
    return tools


def parse_calls(text: str) -> list[Call]:
    """The calls of a JSON text, one object or a list of them. Raises ValueError when they are none."""
    content = json.loads(text)
    calls = content if isinstance(content, list) else [content]
    for call in calls:
        if not (isinstance(call, Mapping) and isinstance(call.get("name"), str) and "arguments" in call):
            raise ValueError("a call without name or arguments")
    return [Call(name=call["name"], arguments=call["arguments"]) for call in calls]


def bare(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool without its wrapping: {"type": "function", "function": tool} -> tool."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def arguments_text(call: Call) -> str:
    """A call's arguments as JSON text; text is taken to be that already."""
    arguments = call["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def arguments_value(call: Call) -> Mapping[str, Any]:
    """A call's arguments as an object. Raises ValueError when they are none."""
    value = json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"]
    if not isinstance(value, Mapping):
        raise ValueError("arguments that are no object")
    return value


def wrapped(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool with its wrapping: tool -> {"type": "function", "function": tool}."""
    return tool if isinstance(tool.get("function"), Mapping) else {"type": "function", "function": tool}


def _described(tool: Mapping[str, Any]) -> str:
    """A tool in sentences: name, description and arguments."""
    parameters = tool.get("parameters") or {}
    required = parameters.get("required") or []
    lines = []
    for name, schema in (parameters.get("properties") or {}).items():
        must = ", required" if name in required else ""
        choices = schema.get("enum")
        one_of = f", should be one of [{', '.join(map(str, choices))}]" if choices else ""
        items = schema.get("items")
        of_items = f", where each item should be {items.get('type', '')}" if items else ""
        kind, description = schema.get("type", ""), schema.get("description", "")
        lines.append(f"  - {name} ({kind}{must}): {description}{one_of}{of_items}\n")
    return f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\nTool Args:\n{''.join(lines)}"
