"""A straight reading of the templates file, as the judge of how a conversation is laid out and tokenised.

Written from the schema alone and sharing no code with the package: it takes the JSON entry, plain strings, `replace`,
and the tokenizer stripped of its control tokens. A conversation is a list of (role, text).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

TAGS = ("think", "tool", "arg_")  # control tokens that answers may hold
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>",
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

    def mark(self, text: str, wanted: Callable[[str], bool] = lambda token: True) -> str:
        for token in sorted(self.tokens, key=len, reverse=True):
            if wanted(token):
                text = text.replace(token, self.tokens[token])
        return text

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
                found = self.plain.encode(piece, add_special_tokens=False)
                ids += found.ids
                places += [(at + a, at + max(b, a + 1)) for a, b in found.offsets]
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
        if role == "assistant":
            text = self.vocabulary.mark_tags(text, self.words)
            return self.slots("assistant", ["{{content}}", *ending]).replace("{{content}}", text)
        call = json.loads(text)
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        layout = self.slots("function", ["Action: {{name}}\nAction Input: {{arguments}}", *ending])
        spelled = f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'
        if self.entry.get("format_function", {}).get("tool_format") == "glm4_moe":
            # the entry's own layout is that of GLM-4; the model's template has tags, as its tools are told
            return self.answer("assistant", self.glm_call(call))
        spelled = self.vocabulary.mark_tags(spelled, self.words)
        layout = layout.replace("{{content}}", spelled)
        arguments = self.vocabulary.mark_tags(arguments, self.words)
        return layout.replace("{{name}}", call["name"]).replace("{{arguments}}", arguments)

    def glm_call(self, call: dict[str, Any]) -> str:
        lines = [f"<tool_call>{call['name']}"]
        for key, value in call["arguments"].items():
            lines += [f"<arg_key>{key}</arg_key>", f"<arg_value>{value}</arg_value>"]
        return "\n".join([*lines, "</tool_call>"])

    def system(self, system: str, tools: list[dict[str, Any]]) -> str:
        text = system or self.entry.get("default_system", "")
        if tools and self.entry.get("format_tools", {}).get("tool_format") in ("qwen", "ling"):
            lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            before, after = map(self.vocabulary.mark, QWEN_TOOLS)
            text += ("\n\n" if text else "") + before + lines + after
        return self.slots("system", ["{{content}}"]).replace("{{content}}", text) if text else ""

    def has_thought(self, role: str, text: str) -> bool:
        return role == "assistant" and any(word.strip() in text for word in self.words)

    def without_thought(self, text: str) -> str:
        opening, closing = (re.escape(word.strip()) for word in self.words)
        return re.sub(f"{opening}.*?{closing}\\s*", "", text, flags=re.DOTALL).lstrip("\n")

    def read(
        self, messages: list[tuple[str, str]], system: str, thinking: str, tools: list[dict[str, Any]]
    ) -> list[tuple[str, bool]]:
        """The marked text in parts, each trained or not."""
        parts = [(self.slots("prefix", []), False)]
        opening = self.system(system, tools)
        for number, (asked, answered) in enumerate(zip(messages[0::2], messages[1::2], strict=True)):
            if number == 0 and self.kind == "Llama2Template":
                question = self.question(asked[0], opening + asked[1], number)
            else:
                question = self.question(*asked, number)
                if number == 0:
                    question = opening + question
                elif self.kind != "LFDefaultTemplate":
                    question = self.slots("separator", []) + question
            role, said = answered
            if self.kind == "ReasoningTemplate" and thinking == "false" and role == "assistant":
                said = self.without_thought(said)
            parts.append((question, False))
            if self.kind == "ReasoningTemplate" and not self.has_thought(role, said):
                parts.append((self.vocabulary.mark("".join(self.words)), thinking == "true"))
            parts.append((self.answer(role, said), True))
        return [*parts, (self.vocabulary.mark(self.eos), True)] if self.efficient else parts

    def row(self, *conversation: Any) -> tuple[list[int], list[int]]:
        """(ids, labels) of a conversation; a token is trained when it holds any trained character."""
        parts = self.read(*conversation)
        ids, places = self.vocabulary.encode("".join(text for text, _ in parts))
        spans, at = [], 0
        for text, trained in parts:
            if trained and text:
                spans.append((at, at + len(text)))
            at += len(text)
        labels = [
            token if any(a < stop and b > start for start, stop in spans) else -100
            for token, (a, b) in zip(ids, places, strict=True)
        ]
        return ids, labels
