"""A straight reading of the templates file, as the judge of how a conversation is laid out and tokenised.

Written from the schema alone and sharing no code with the package: it takes the JSON entry, plain strings, `replace`,
and the tokenizer stripped of its control tokens. A conversation is a list of (role, text); a function's text is JSON.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

Said = tuple[str, str]
Tools = list[dict[str, Any]]
TAGS = ("think", "tool", "arg_")  # control tokens that answers may hold
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>",
)
GLM45_CLOSING = (
    "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
    "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
)
GLM4_OPENING = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
PLAIN_CLOSING = (
    "Use the following format if using a tool:\n```\nAction: tool name (one of [{names}]).\nAction Input: the input to "
    'the tool, in a JSON format representing the kwargs (e.g. ```{{"input": "hello world", "num_beams": 5}}```).'
    "\n```\n"
)


class Vocabulary:
    """A tokenizer in which control tokens are what is marked, and everything else is text."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self.marks = {f"\ue000{t['id']}\ue001": t for t in content["added_tokens"]}
        content["added_tokens"], content["post_processor"] = [], None
        self.plain = Tokenizer.from_str(json.dumps(content))
        self.tokens = {t["content"]: mark for mark, t in self.marks.items()}
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.bos, self.eos = config.get("bos_token") or "", config.get("eos_token") or "<|endoftext|>"

    @lru_cache(maxsize=20_000)  # noqa: B019 - pieces of templates come again and again
    def pieces(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.plain.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def mark(self, text: str, wanted: Callable[[str], bool] = lambda token: True) -> str:
        for token in sorted(self.tokens, key=len, reverse=True):
            if wanted(token):
                text = text.replace(token, self.tokens[token])
        return text

    def added(self, token: str) -> int:
        return self.marks[self.tokens[token]]["id"]

    def mark_tags(self, text: str, words: list[str]) -> str:
        return self.mark(text, lambda t: any(tag in t for tag in TAGS) or any(t in word for word in words))

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a marked text, and the characters of it that each token holds."""
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        at = 0
        for piece in re.split("(\ue000[0-9]+\ue001)", text):
            if piece in self.marks:
                ids.append(self.marks[piece]["id"])
                places.append((at, at + len(piece)))
            elif piece:
                found, offsets = self.pieces(piece)
                ids += found
                places += [(at + a, at + max(b, a + 1)) for a, b in offsets]
            at += len(piece)
        return ids, places


class Reader:
    """One entry of the templates file, read aloud."""

    def __init__(self, entry: dict[str, Any], vocabulary: Vocabulary) -> None:
        self.entry = entry
        self.vocabulary = vocabulary
        stop_words = entry.get("stop_words", [])
        self.eos = stop_words[0] if entry.get("replace_eos") else vocabulary.eos
        self.efficient = entry.get("efficient_eos", False)
        self.words = entry.get("thought_words", ["<think>\n", "\n</think>\n\n"])
        self.kind = entry.get("template_class", "Template")

    def slots(self, part: str, default: list[Any]) -> str:
        """A format as one marked string with its placeholders."""
        text = ""
        for slot in self.entry.get(f"format_{part}", {}).get("slots", default):
            if isinstance(slot, str):
                text += slot
            elif isinstance(slot, dict):
                text += slot["token"]
            else:
                text += self.vocabulary.bos if slot == ["bos_token"] else self.eos
        return self.vocabulary.mark(text)

    def question(self, role: str, text: str, number: int) -> str:
        user = self.entry.get("format_user", {}).get("slots", ["{{content}}"])
        layout = self.slots("observation", user) if role == "observation" else self.slots("user", user)
        # the number first, so that a text that holds the placeholder keeps it
        return layout.replace("{{idx}}", str(number)).replace("{{content}}", text)

    def answer(self, role: str, text: str) -> str:
        ending = [] if self.efficient else [["eos_token"]]
        words = self.words
        if role == "assistant":
            text = self.vocabulary.mark_tags(text, words)
            return self.slots("assistant", ["{{content}}", *ending]).replace("{{content}}", text)
        calls = json.loads(text)
        calls = calls if isinstance(calls, list) else [calls]
        form = self.entry.get("format_function", {}).get("tool_format")
        if form == "glm4_moe":
            # the entry's own layout is that of GLM-4; the model's template has tags, as its tools are told
            return self.answer("assistant", "\n".join(map(self.glm_call, calls)))
        layout = self.slots("function", ["Action: {{name}}\nAction Input: {{arguments}}", *ending])
        spelled = []
        for call in calls:
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            spelled.append((call["name"], arguments))
        if form in ("qwen", "ling"):
            tagged = (f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in spelled)
            return layout.replace("{{content}}", self.vocabulary.mark_tags("\n".join(tagged), words))
        # the end of the answer stands after the last call alone
        end = self.vocabulary.mark(self.eos)
        between = layout.removesuffix(end) + "\n"
        layouts = [between] * (len(spelled) - 1) + [layout]
        marked = [tuple(self.vocabulary.mark_tags(part, words) for part in call) for call in spelled]
        return "".join(
            one.replace("{{name}}", n).replace("{{arguments}}", a) for one, (n, a) in zip(layouts, marked, strict=True)
        )

    def glm_call(self, call: dict[str, Any]) -> str:
        lines = [f"<tool_call>{call['name']}"]
        for key, value in call["arguments"].items():
            spelled = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines += [f"<arg_key>{key}</arg_key>", f"<arg_value>{spelled}</arg_value>"]
        return "\n".join([*lines, "</tool_call>"])

    def system(self, system: str, tools: Tools) -> str:
        text = system or self.vocabulary.mark(self.entry.get("default_system", ""))
        layout = self.slots("system", ["{{content}}"])
        if not tools:
            return layout.replace("{{content}}", text) if text else ""
        told = self.tools_text(tools)
        form = self.entry.get("format_tools", {}).get("tool_format")
        if form == "glm4_moe":
            return layout.replace("{{content}}", told) + (layout.replace("{{content}}", text) if text else "")
        gap = "\n\n" if text and form in ("qwen", "ling", "glm4") else ""
        return layout.replace("{{content}}", text + gap + told)

    def tools_text(self, tools: Tools) -> str:
        form = self.entry.get("format_tools", {}).get("tool_format", "default")
        bare = [tool.get("function", tool) for tool in tools]
        if form == "glm4":
            sections = ""
            for tool in bare:
                sections += f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}"
                sections += "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
            return GLM4_OPENING + sections
        if form == "default":
            names = ", ".join(tool["name"] for tool in bare)
            told = "You have access to the following tools:\n" + "\n".join(map(self.described, bare)) + "\n"
            return told + PLAIN_CLOSING.format(names=names)
        given = tools if form == "glm4_moe" else [{"type": "function", "function": tool} for tool in bare]
        lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in given)
        closing = GLM45_CLOSING if form == "glm4_moe" else QWEN_TOOLS[1]
        return self.vocabulary.mark(QWEN_TOOLS[0]) + lines + self.vocabulary.mark(closing)

    def described(self, tool: dict[str, Any]) -> str:
        text = f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\nTool Args:\n"
        parameters = tool.get("parameters", {})
        for name, schema in parameters.get("properties", {}).items():
            required = ", required" if name in parameters.get("required", []) else ""
            text += f"  - {name} ({schema.get('type', '')}{required}): {schema.get('description', '')}"
            if "enum" in schema:
                text += f", should be one of [{', '.join(schema['enum'])}]"
            if "items" in schema:
                text += f", where each item should be {schema['items']['type']}"
            text += "\n"
        return text

    def has_thought(self, role: str, text: str) -> bool:
        return role == "assistant" and any(word.strip() in text for word in self.words)

    def without_thought(self, text: str) -> str:
        opening, closing = (re.escape(word.strip()) for word in self.words)
        return re.sub(f"{opening}.*?{closing}\\s*", "", text, flags=re.DOTALL).lstrip("\n")

    def merged(self, messages: list[Said]) -> list[Said]:
        """The messages, of which several answers of tools in a row are one."""
        slots = "".join(s for s in self.entry.get("format_observation", {}).get("slots", []) if isinstance(s, str))
        tagged = "<tool_response>" in slots
        made: list[Said] = []
        for role, text in messages:
            if made and role == made[-1][0] == "observation":
                between = "\n</tool_response>\n<tool_response>\n" if tagged else "\n"
                made[-1] = (role, made[-1][1] + self.vocabulary.mark(between) + text)
            else:
                made.append((role, text))
        return made

    def side(self, message: Said, number: int, opening: str) -> str:
        """What is written for the message at a place, `opening` before the first."""
        role, text = message
        if number % 2:
            return self.answer(role, text)
        if number == 0 and self.kind == "Llama2Template":
            return self.question(role, opening + text, 0)
        asked = self.question(role, text, number // 2)
        if number == 0:
            return opening + asked
        return asked if self.kind == "LFDefaultTemplate" else self.slots("separator", []) + asked

    def read(self, messages: list[Said], system: str, thinking: str, tools: Tools) -> list[tuple[str, bool]]:
        """Contract 2.5, several turns: the marked text in parts, each trained or not."""
        parts = [(self.slots("prefix", []), False)]
        opening = self.system(system, tools)
        for number, (role, text) in enumerate(self.merged(messages)):
            if number % 2 and self.kind == "ReasoningTemplate":
                text = self.without_thought(text) if thinking == "false" and role == "assistant" else text
                if not self.has_thought(role, text):
                    parts.append((self.vocabulary.mark("".join(self.words)), thinking == "true"))
            side = self.side((role, text), number, opening)
            if self.efficient and number and number % 2 == 0:
                # nothing closes an answer: the token that opens the next turn is trained where generation stops at it
                marks = map(self.vocabulary.mark, self.entry.get("stop_words", []))
                stop = next((mark for mark in marks if side.startswith(mark)), "")
                parts.append((stop, True))
                side = side.removeprefix(stop)
            parts.append((side, bool(number % 2)))
        return [*parts, (self.vocabulary.mark(self.eos), True)] if self.efficient else parts

    def read_last(self, messages: list[Said], system: str, thinking: str, tools: Tools) -> list[tuple[str, bool]]:
        """Contract 2.5, one turn: all before the last answer as a prompt holds it, and that answer, alone trained.

        Against its letter, thoughts with which tools were called since the last question stay, as in the models' own
        chat templates.
        """
        reasons = self.kind == "ReasoningTemplate"
        parts = [(self.slots("prefix", []), False)]
        opening = self.system(system, tools)
        messages = self.merged(messages)
        asked = max(n for n, (role, _) in enumerate(messages) if role == "user")
        for number, (role, text) in enumerate(messages):
            last = number == len(messages) - 1
            if reasons and role == "assistant":
                running = number > asked and thinking != "false" and self.has_thought(role, text)
                if not running and (not last or thinking == "false"):
                    text = self.without_thought(text)
                if not running and not last and self.words[1].startswith("<|end|><|start|>assistant"):
                    text = self.words[1].removeprefix("<|end|><|start|>assistant") + text  # gpt-oss names a channel
            if reasons and last and not self.has_thought(role, text):
                parts.append((self.vocabulary.mark("".join(self.words)), thinking == "true"))
            parts.append((self.side((role, text), number, opening), last))
        return [*parts, (self.vocabulary.mark(self.eos), True)] if self.efficient else parts

    def row(self, messages: list[Said], system: str, thinking: str, tools: Tools) -> tuple[list[int], list[int]]:
        """(ids, labels) of a conversation."""
        return self.tokens(self.read(messages, system, thinking, tools))

    def tokens(self, parts: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """(ids, labels) of some parts; a token is trained when it holds any trained character."""
        ids, places = self.vocabulary.encode("".join(text for text, _ in parts))
        trained = "".join(("x" if flag else " ") * len(text) for text, flag in parts)
        return ids, [token if "x" in trained[a:b] else -100 for token, (a, b) in zip(ids, places, strict=True)]
