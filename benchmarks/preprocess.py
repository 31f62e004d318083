"""Preprocessing beside its limit: `preprocess_data.py` all in, the tokenizer library alone, and datasets.map.

    python benchmarks/preprocess.py [--rows 20000] [--wide-rows 100000] [--rounds 3] [--large N] [--pack] [--write]
    python benchmarks/preprocess.py --given alpaca20k.jsonl TOKENIZER_FOLDER --inputs wide

Two inputs, made by a seed: `short`, twenty sentences in two languages mixed to Alpaca-like rows, with a small BPE
vocabulary; and `wide`, rows of 250,000 distinct words with a BPE vocabulary of 150,000 entries. For each, in rounds so
that a machine that drifts slows all alike:

    limit   rows / seconds of `encode_batch_fast` over the rendered texts, best of batch sizes 200 to 8,000
    ours    rows / seconds of the whole program, from its start to the last file on disk, one worker
    peer    rows / seconds of `datasets.map` with two processes over the same texts, its start included

Printed: each rate's best round, the share of the limit, start-up, and the peak resident memory of the process tree;
with `--large N` also that of N rows, one of 10,000,000 characters among them; with `--pack` the fill of packs and the
seconds to pack a million lengths.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

BATCHES = (200, 500, 1000, 2000, 4000, 8000)
WORDS, ENTRIES = 250_000, 150_000
SENTENCES = [
    "A kettle of water boils faster under a lid.",
    "Sort the list by length, then by name.",
    "def area(r): return 3.14 * r * r",
    "The ferry leaves at nine and returns before dusk.",
    "Seven of the twelve lamps were lit: 1, 2, 3, 5, 8, 11, 12.",
    "Explain how a rainbow forms, in two sentences.",
    "She wrote the answer on the back of the map.",
    "A pipeline splits its layers over several machines and passes activations on.",
    "Translate the next line into Chinese.",
    "Memory, not arithmetic, is what most programs wait for.",
    "请用一句话解释什么是梯度。",
    "北京的秋天天气晴朗，适合散步。",
    "把下面的数字从小到大排序：9、4、27、1。",
    "这段代码读取文件并统计每个词出现的次数。",
    "训练之前要先把文本变成词元。",
    "如果列表为空，函数返回零。",
    "河边的石头被水磨得很圆。",
    "请写一首关于雨夜的短诗。",
]
VOWELS, ENDS = ("a", "e", "i", "o", "u", "ai", "ou"), ("", "n", "r", "st")


def sentence_rows(count: int) -> Iterator[dict[str, str]]:
    """Alpaca-like rows of few distinct sentences."""
    draw = random.Random(7)

    def text(most: int) -> str:
        return " ".join(draw.choice(SENTENCES) for _ in range(draw.randint(1, most)))

    for number in range(count):
        given = text(3) if draw.random() < 0.4 else ""
        yield {"instruction": f"[{number}] {text(2)}", "input": given, "output": text(12)}


def made_up_words() -> list[str]:
    """`WORDS` distinct words of syllables, the frequent ones short."""
    draw = random.Random(11)
    syllables = [consonant + vowel + end for consonant in "bcdfghklmnprstvz" for vowel in VOWELS for end in ENDS]
    words: dict[str, None] = {}
    while len(words) < WORDS:
        words["".join(draw.choice(syllables) for _ in range(2 + len(words) * 3 // WORDS))] = None
    return list(words)


def word_rows(count: int) -> Iterator[dict[str, str]]:
    """Rows of all the made-up words, each as likely as words of a language are by their rank."""
    draw = random.Random(13)
    words = made_up_words()

    def text(least: int, most: int) -> str:
        return " ".join(words[int(WORDS ** draw.random()) - 1] for _ in range(draw.randint(least, most)))

    for number in range(count):
        # every word of the vocabulary comes at least once
        own = " ".join(words[number * WORDS // count : (number + 1) * WORDS // count])
        yield {"instruction": f"[{number}] {text(5, 25)}", "input": own, "output": text(20, 160)}


def make_tokenizer(folder: Path, texts: Iterator[str], entries: int) -> None:
    """A byte-level BPE tokenizer of at most so many entries, with the tokens the qwen3 template needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries, special_tokens=special, show_progress=False, min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def prepare(work: Path, name: str, rows: int) -> tuple[Path, Path]:
    """(rows file, tokenizer folder) of an input, made when they are missing."""
    source, tokenizer = work / f"{name}_{rows}.jsonl", work / f"{name}_tokenizer"
    maker = sentence_rows if name == "short" else word_rows
    if not source.exists():
        with source.open("w", encoding="utf-8") as stream:
            for row in maker(rows):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not tokenizer.exists():
        texts = iter(SENTENCES * 3) if name == "short" else (" " + word for word in made_up_words())
        make_tokenizer(tokenizer, texts, 1500 if name == "short" else ENTRIES)
    return source, tokenizer


def rendered(source: Path) -> list[str]:
    """The rows as the qwen3 template writes them."""
    texts = []
    with source.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
            texts.append(
                f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
                f"{row['output']}<|im_end|>\n"
            )
    return texts


def limit(tokenizer: Path, texts: list[str]) -> tuple[float, int]:
    """(rows per second, batch size) of the library alone, at its best batch size."""
    from tokenizers import Tokenizer

    inner = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    rates = []
    for size in BATCHES:
        begin = time.perf_counter()
        for at in range(0, len(texts), size):
            inner.encode_batch_fast(texts[at : at + size], add_special_tokens=False)
        rates.append((len(texts) / (time.perf_counter() - begin), size))
    return max(rates)


def ours(source: Path, tokenizer: Path, out: Path, workers: int = 1) -> tuple[float, float]:
    """(seconds, peak MiB of the process tree) of the whole program."""
    return watched(
        [sys.executable, str(REPO / "preprocess_data.py"), "--input", str(source), "--output-prefix", str(out / "x"),
         "--tokenizer-name-or-path", str(tokenizer), "--handler-name", "AlpacaStyleInstructionHandler",
         "--prompt-type", "qwen3", "--overwrite", "--workers", str(workers), "--log-interval", "1000000000"]
    )  # fmt: skip


def peer(tokenizer: Path, texts: Path, out: Path) -> float:
    """Seconds of `datasets.map` with two processes, from start to files on disk."""
    code = (
        "import sys, datasets, transformers\n"
        "tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=sys.argv[1] + '/tokenizer.json')\n"
        "rows = datasets.load_dataset('json', data_files=sys.argv[2], split='train', cache_dir=sys.argv[3])\n"
        "rows = rows.map(lambda batch: {'input_ids': tokenizer(batch['text'])['input_ids']}, batched=True,\n"
        "                num_proc=2, remove_columns=['text'])\n"
        "rows.save_to_disk(sys.argv[3] + '/out')\n"
    )
    return watched([sys.executable, "-c", code, str(tokenizer), str(texts), str(out)])[0]


def watched(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB of the process and its children together) of a command that must succeed."""
    import psutil

    peak = 0
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPO)
    tree = psutil.Process(process.pid)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                peak = max(peak, sum(p.memory_info().rss for p in [tree, *tree.children(recursive=True)]))
            except psutil.Error:
                continue
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, error = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ... ended with {process.returncode}: {error.decode()[-600:]}")
    return time.perf_counter() - begin, peak / 2**20


def measure(work: Path, name: str, source: Path, tokenizer: Path, rounds: int) -> dict[str, Any]:
    """All rates of one input."""
    texts = rendered(source)
    rows = len(texts)
    lines = work / f"{name}_texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    one = work / "one.jsonl"
    one.write_text(source.read_text(encoding="utf-8").split("\n", 1)[0] + "\n", encoding="utf-8")
    found: dict[str, Any] = {"input": name, "rows": rows, "limit": 0.0, "ours": 0.0, "peer": 0.0, "peak": 0.0}
    found["start"] = float("inf")
    for turn in range(rounds):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            rate, size = limit(tokenizer, texts)
            if rate > found["limit"]:
                found |= {"limit": rate, "batch": size}
            seconds, peak = ours(source, tokenizer, Path(folder))
            found["ours"] = max(found["ours"], rows / seconds)
            found["peak"] = max(found["peak"], peak)
            found["start"] = min(found["start"], ours(one, tokenizer, Path(folder))[0])
            found["peer"] = max(found["peer"], rows / peer(tokenizer, lines, Path(folder)))
        print(f"{name}, round {turn + 1}: {json.dumps(found)}", flush=True)
    return found


def measure_large(work: Path, rows: int) -> float:
    """Peak MiB at many rows, one of them of ten million characters."""
    _, tokenizer = prepare(work, "short", 1000)
    source = work / f"large_{rows}.jsonl"
    with source.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(sentence_rows(rows)):
            if number == rows // 2:
                row["output"] = "ten million " * (10_000_000 // 12)
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        peak = ours(source, tokenizer, Path(folder))[1]
    source.unlink()
    return peak


def measure_packing() -> list[str]:
    """Fill and time of a million Alpaca-like lengths."""
    import numpy as np

    from mindspeed_llm.data.packing import pack_rows

    lengths = np.clip(np.random.default_rng(11).lognormal(4.6, 0.8, 1_000_000).astype(int) + 25, 20, 2040)
    lines = []
    for capacity in (2048, 4096):
        begin = time.perf_counter()
        packs = pack_rows(lengths, capacity, seed=1)
        seconds = time.perf_counter() - begin
        least = -(-int(lengths.sum()) // capacity)
        lines.append(
            f"1,000,000 lengths in packs of {capacity}: {seconds:.2f} s, {lengths.sum() / (len(packs) * capacity):.3%} "
            f"filled, {len(packs) / least - 1:.3%} more than the least number"
        )
    return lines


def main() -> int:
    """Measure, print, and with `--write` add to results.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--wide-rows", type=int, default=100_000, help="rows of `wide`: fewer hold more new words each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inputs", nargs="*", default=["short", "wide"], choices=["short", "wide"])
    parser.add_argument("--given", nargs=2, type=Path, metavar=("ROWS", "TOKENIZER"), help="an input of your own")
    parser.add_argument("--large", type=int, default=0)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_preprocess")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    lines = [f"## Preprocessing, {date.today()}, {machine}", ""]
    lines += [
        "| input | limit rows/s (batch) | ours rows/s | share | datasets.map x2 | ours / peer | start s | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (["given"] if given.given else []) + given.inputs:
        if name == "given":
            pair = (given.given[0], given.given[1])
        else:
            pair = prepare(given.work, name, given.rows if name == "short" else given.wide_rows)
        m = measure(given.work, name, *pair, given.rounds)
        lines.append(
            f"| {pair[0].name}, {m['rows']:,} rows | {m['limit']:,.0f} ({m['batch']}) | {m['ours']:,.0f} | "
            f"{m['ours'] / m['limit']:.0%} | {m['peer']:,.0f} | {m['ours'] / m['peer']:.1f} | {m['start']:.2f} | "
            f"{m['peak']:.0f} |"
        )
    if given.large:
        peak = measure_large(given.work, given.large)
        lines += ["", f"{given.large:,} rows, one of 10,000,000 characters: peak {peak:.0f} MiB"]
    if given.pack:
        lines += ["", *measure_packing()]
    print("\n".join(lines))
    if given.write:
        with (REPO / "benchmarks" / "results.md").open("a", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
