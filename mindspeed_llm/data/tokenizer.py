"""Text to token ids and back, from the files of a model folder.

A `tokenizer.json` is read by the `tokenizers` library alone, so that preprocessing starts without torch or
transformers; a folder without one (sentencepiece only) goes through transformers' AutoTokenizer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mindspeed_llm.errors import InputError

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token")
# the files that decide the ids of a folder without tokenizer.json
VOCABULARY_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")


class Backend(Protocol):
    """What a tokenizer library has to offer; ids are plain ints, no special token is added."""

    vocab_size: int
    rust: Any  # the `tokenizers` library's object behind it, None when there is none

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        """Ids of each text; on request with the tokens its model puts around every text."""

    def encode_as_text(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are not recognised."""

    def decode_as_it_is(self, ids: Sequence[int]) -> str:
        """Text of the ids, spaces not tidied."""

    def control_tokens(self) -> dict[str, int]:
        """The added tokens with their ids, in the order of these."""

    def add_special(self, token: str) -> int:
        """Append a special token to the table and return its id."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of the ids."""

    def token_to_id(self, token: str) -> int | None:
        """Id of a token of the table, None when it is not in it."""

    def id_to_token(self, token_id: int) -> str | None:
        """Token of an id, None beyond the table."""


class Tokenizer:
    """A tokenizer with the names of its special tokens.

    Attributes:
        path: the folder it was read from.
        bos_token, eos_token, pad_token: as the folder's files name them; None when they name none.
        chat_template: the folder's Jinja chat template, None when it has none.
        content_hash: sha256 over everything that decides which ids a text gets (files and special-token names).
    """

    def __init__(
        self, path: Path, backend: Backend, special: Mapping[str, str], chat_template: str | None, content_hash: str
    ) -> None:
        self.path = path
        self.backend = backend
        self.bos_token = special.get("bos_token")
        self.eos_token = special.get("eos_token")
        self.pad_token = special.get("pad_token")
        self.chat_template = chat_template
        self.content_hash = content_hash

    @property
    def vocab_size(self) -> int:
        """Number of entries of the table, added tokens included."""
        return self.backend.vocab_size

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-text token, None when there is none."""
        return None if self.bos_token is None else self.token_to_id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token, None when there is none."""
        return None if self.eos_token is None else self.token_to_id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, None when there is none."""
        return None if self.pad_token is None else self.token_to_id(self.pad_token)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no begin- or end-of-text token is added."""
        return self.backend.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores the library may use."""
        return self.backend.encode_batch(texts)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` with the tokens the tokenizer's own rules put around a document (such as begin-of-text)."""
        return self.backend.encode_batch(texts, special_tokens=True)

    def encode_as_text(self, text: str) -> list[int]:
        """`encode` with special tokens read as the text they look like (tokenizers without a Rust part only)."""
        return self.backend.encode_as_text(text)

    def decode_as_it_is(self, ids: Sequence[int]) -> str:
        """`decode` without tidying spaces (tokenizers without a Rust part only)."""
        return self.backend.decode_as_it_is(ids)

    @property
    def rust(self) -> Any:
        """The `tokenizers` library's object behind it, None for slow tokenizers."""
        return self.backend.rust

    def control_tokens(self) -> dict[str, int]:
        """The added tokens (special or not) with their ids, in the order of these."""
        return self.backend.control_tokens()

    def with_special_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """This tokenizer, or, where it lacks some of the tokens, one that has them appended to its table."""
        missing = [token for token in dict.fromkeys(tokens) if self.token_to_id(token) is None]
        if not missing:
            return self
        extended = load_tokenizer(self.path)
        for token in missing:
            extended.backend.add_special(token)
        return extended

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids; control tokens are left out on request."""
        return self.backend.decode(ids, skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """Id of one token of the table, None when the table lacks it."""
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the table spells it, None beyond the table."""
        return self.backend.id_to_token(token_id)


class _FastBackend:
    """The `tokenizers` library on a tokenizer.json."""

    def __init__(self, file: Path, added: Mapping[str, Any]) -> None:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as RustTokenizer

        try:
            self.inner = RustTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise InputError(f"{file} cannot be read as a tokenizer ({error}); download it again") from error
        self.inner.no_truncation()
        self.inner.no_padding()
        self.added: dict[str, str] = {}  # id -> token, those that only tokenizer_config.json knows
        for token_id, entry in sorted(added.items(), key=lambda item: int(item[0])):
            if self.inner.token_to_id(entry["content"]) is None:
                flags = {k: v for k, v in entry.items() if k not in ("content", "__type")}
                self.inner.add_tokens([AddedToken(entry["content"], **flags)])
                found = self.inner.token_to_id(entry["content"])
                if found != int(token_id):
                    raise InputError(
                        f"{file.parent}: tokenizer_config.json gives {entry['content']!r} the id {token_id}, but after "
                        f"{file.name} it would be {found}; the two files belong to different models"
                    )
                self.added[token_id] = entry["content"]
        self.vocab_size: int = self.inner.get_vocab_size(with_added_tokens=True)
        self.rust: Any = self.inner

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        return [e.ids for e in self.inner.encode_batch_fast(list(texts), add_special_tokens=special_tokens)]

    def encode_as_text(self, text: str) -> list[int]:
        raise NotImplementedError("the Rust part is used instead")

    def decode_as_it_is(self, ids: Sequence[int]) -> str:
        raise NotImplementedError("the Rust part is used instead")

    def control_tokens(self) -> dict[str, int]:
        return _added_tokens(self.inner)

    def add_special(self, token: str) -> int:
        self.inner.add_special_tokens([token])
        self.vocab_size = self.inner.get_vocab_size(with_added_tokens=True)
        return self.inner.token_to_id(token)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.inner.id_to_token(int(token_id))


class _TransformersBackend:
    """AutoTokenizer, for folders that carry no tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises many kinds here; all mean that the folder does not fit
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{folder} holds no tokenizer that can be read ({first})") from error
        self.vocab_size: int = len(self.inner)
        self.table: dict[str, int] = self.inner.get_vocab()
        self.rust: Any = getattr(self.inner, "backend_tokenizer", None) if self.inner.is_fast else None

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        return [self.inner.encode(text, add_special_tokens=special_tokens) for text in texts]

    def encode_as_text(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode_as_it_is(self, ids: Sequence[int]) -> str:
        return self.inner.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def control_tokens(self) -> dict[str, int]:
        if self.rust is not None:
            return _added_tokens(self.rust)
        return {str(token): token_id for token_id, token in sorted(self.inner.added_tokens_decoder.items())}

    def add_special(self, token: str) -> int:
        self.inner.add_special_tokens({"additional_special_tokens": [token]}, replace_additional_special_tokens=False)
        self.vocab_size, self.table = len(self.inner), self.inner.get_vocab()
        return self.table[token]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.table.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.inner.convert_ids_to_tokens(int(token_id)) if token_id < self.vocab_size else None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Raises:
        InputError: no such folder, no tokenizer in it, or files that contradict each other.
    """
    folder = Path(path).expanduser()
    if folder.is_file() and folder.name == "tokenizer.json":
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"no tokenizer folder {folder}; give the model folder that holds tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    fast_file = folder / "tokenizer.json"
    added: dict[str, str] = {}
    if fast_file.is_file():
        fast = _FastBackend(fast_file, config.get("added_tokens_decoder") or {})
        backend: Backend = fast
        files, added = [fast_file], fast.added
    else:
        files = [f for f in (folder / name for name in VOCABULARY_FILES) if f.is_file()]
        if not files:
            present = ", ".join(sorted(f.name for f in folder.iterdir())[:12]) or "nothing"
            raise InputError(f"{folder} holds no tokenizer.json or vocabulary file (it holds: {present})")
        backend = _TransformersBackend(folder)
    return Tokenizer(folder, backend, special, _chat_template(folder, config), _content_hash(files, special, added))


def _added_tokens(rust: Any) -> dict[str, int]:
    return {token.content: token_id for token_id, token in sorted(rust.get_added_tokens_decoder().items())}


def _read_json(file: Path) -> dict[str, Any]:
    """The file's object; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a JSON {type(content).__name__}, an object is expected")
    return content


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Names of the special tokens; the first source that names one wins. A token is text or {"content": text}."""
    found: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        for source in sources:
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and name not in found:
                found[name] = value
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The Jinja template: its own file first, as transformers does, then tokenizer_config.json's default one."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}.get("default")
    return value if isinstance(value, str) else None


def _content_hash(files: Sequence[Path], special: Mapping[str, str], added: Mapping[str, str]) -> str:
    """sha256 over the vocabulary files, the special-token names and the tokens that only the configuration adds."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    digest.update(json.dumps([dict(special), dict(added)], sort_keys=True).encode())
    return digest.hexdigest()
