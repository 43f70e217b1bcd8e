"""Long prompts of real text that is on every machine with the plugin's dependencies: no network, no model.

    python benchmarks/long_prompts.py --model .models/smollm2-135m --tokens 4096 --out long-4096.jsonl
                                      [--count 64] [--seed 0] [--spec-bench spec_bench.jsonl]
    specplug ab .models/smollm2-135m --workload long-4096.jsonl --output-tokens 128

Three kinds by turns: ``summarise`` and ``qa`` over prose (the Python language reference inside the standard library,
Newton's Opticks where tvm-ffi brings it, CMake's manual, READMEs of installed packages, with ``--spec-bench`` also its
articles and passages), and ``code`` (continue, explain, refactor: Python's, PyTorch's, transformers' and NumPy's own
files). The task stands after the text, all within the model's chat template, and every prompt has exactly as many
tokens as asked; no two share a part of a text. The same installed packages, tokenizer and seed give the same prompts;
the digest that is printed says so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("summarise", "qa", "code")
#: Spec-Bench's tasks whose turns are mostly text.
_ARTICLES = frozenset(["summarization", "rag"])
#: Whose READMEs are long and mostly sentences.
_READMES = ("charset-normalizer", "fastapi", "loguru", "matplotlib", "more-itertools", "numba", "pydantic", "pytest")
_READMES += ("python-dotenv", "regex", "sentencepiece", "supervisor", "torch", "tqdm", "transformers", "vllm", "yarl")
#: More characters per token than any tokenizer makes of text.
_MOST_CHARS = 8
_PLACE = "\ue000"  # where the text goes; of no text

_SUMMARISE = (
    "Summarise the text above in one paragraph, then list its five most important points.",
    "Write a summary of the text above for a reader who has not seen it. Keep its terms and names.",
    "What is the text above about? Go through it from its beginning to its end, a sentence or two for each part.",
)
_CODE = (
    "Continue the last file above from where it stops. Keep to its style and reuse what it defines.",
    "Explain what the code above does, one function or class after another, and how they work together.",
    "Refactor the last complete function above: shorter, with type hints and a docstring. Show the new code in full.",
)


def long_prompts(
    tokenizer: Any, count: int, tokens: int, seed: int = 0, spec_bench: Path | None = None
) -> list[dict[str, Any]]:
    """``count`` prompts of exactly ``tokens`` tokens, the kinds by turns.

    Args:
        tokenizer: one of transformers'; its chat template is used if it has one.
        count: of prompts.
        tokens: of every prompt, the chat template's included.
        seed: which texts, in which order.
        spec_bench: its ``question.jsonl``, as a further source of prose.

    Returns:
        For each ``prompt_token_ids``, ``task`` (of :data:`KINDS`) and ``source``.

    Raises:
        ValueError: ``tokens`` leaves no room for text, or the machine does not have as much text.
    """
    rng = np.random.default_rng(seed)
    special = [text for text in tokenizer.all_special_tokens if len(text) > 2]
    supplies = {kind: _supply(sources, tokenizer, special, rng) for kind, sources in _sources(spec_bench).items()}
    found: list[dict[str, Any]] = []
    for number in range(count):
        kind, turn = KINDS[number % len(KINDS)], number // len(KINDS)
        supply = supplies["code" if kind == "code" else "prose"]
        ask = {"summarise": _summary, "qa": _question, "code": _programming}[kind]
        # Each kind goes through all sources, in random order.
        supply.sort(key=lambda source, k=kind: (source.served[k], source.served.total(), rng.random()))
        prompt = _prompt(tokenizer, supply, tokens, lambda text, a=ask, t=turn: a(text, t, rng))
        if prompt is None:
            raise ValueError(f"count = {count}: this machine has text for {number} prompts of {tokens} tokens only.")
        ids, source = prompt
        source.served[kind] += 1
        found.append({"prompt_token_ids": ids, "task": kind, "source": source.name})
    return found


# Prompts


class _Supply:
    """One source's text, from which prompts take one part after another."""

    def __init__(self, name: str, text: str, tokenizer: Any) -> None:
        self.name, self.served = name, Counter[str]()
        self._text, self._at, self._tokenizer = text, 0, tokenizer

    def take(self, count: int) -> list[int] | None:
        """The next ``count`` tokens, from the beginning of a paragraph; None: there are not as many left."""
        part = self._text[self._at : self._at + count * _MOST_CHARS]
        ids = self._tokenizer.encode(part, add_special_tokens=False)[:count]
        if len(ids) < count:
            return None
        end = self._at + len(self._tokenizer.decode(ids))
        # A paragraph that was cut belongs to no further prompt.
        following = self._text.find("\n\n", end)
        self._at = len(self._text) if following < 0 else following + 2
        return list(ids)


def _supply(
    sources: dict[str, list[str]], tokenizer: Any, special: Sequence[str], rng: np.random.Generator
) -> list[_Supply]:
    """Each source's documents in random order, one of them begun in its middle if it is the only one."""
    found = []
    for name, documents in sources.items():
        # Text with a special token would become one, and so a broken conversation.
        clean = [text for text in documents if not any(mark in text for mark in special)]
        if len(clean) == 1:
            begin = clean[0].find("\n\n", int(rng.integers(len(clean[0]) // 2)))
            clean = [clean[0][begin + 2 :], clean[0][: begin + 2]]
        else:
            clean = [clean[place] for place in rng.permutation(len(clean))]
        found.append(_Supply(name, "\n\n".join(clean), tokenizer))
    return found


def _prompt(
    tokenizer: Any, supply: list[_Supply], tokens: int, ask: Callable[[str], str]
) -> tuple[list[int], _Supply] | None:
    """Token ids and their source; None: no source has enough text left."""
    for source in supply:
        body = source.take(tokens)
        if body is None:
            continue
        # The task is about the part that surely remains once the template and the task have taken their room.
        task = ask(tokenizer.decode(body[: max(tokens - 256, tokens // 2)]))
        head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in _frame(tokenizer, task))
        room = tokens - len(head) - len(tail)
        if room < 16:
            raise ValueError(f"tokens = {tokens} is not allowed: the task and the chat template leave no room for text")
        return [*head, *body[:room], *tail], source
    return None


def _frame(tokenizer: Any, task: str) -> tuple[str, str]:
    """What precedes and what follows the text."""
    message = f"Here is a long text.\n\n{_PLACE}\n\nThis is the end of the text. {task}"
    if getattr(tokenizer, "chat_template", None):
        conversation = [{"role": "user", "content": message}]
        message = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    head, _, tail = message.partition(_PLACE)
    return head, tail


def _summary(text: str, turn: int, rng: np.random.Generator) -> str:
    return _SUMMARISE[turn % len(_SUMMARISE)]


def _programming(text: str, turn: int, rng: np.random.Generator) -> str:
    return _CODE[turn % len(_CODE)]


def _question(text: str, turn: int, rng: np.random.Generator) -> str:
    """By turns about a term that the text uses now and then, and about a sentence in it."""
    if turn % 2:
        sentences = [
            s for s in re.findall(r"(?<=[.:] )[A-Z][a-z]+(?: [a-z,]+){8,30}\.", " ".join(text.split())) if "," in s
        ]
        if sentences:
            opening = " ".join(sentences[int(rng.integers(len(sentences)))].split()[:7])
            return f'Find the sentence that begins with "{opening}". Quote it, then explain what it means here.'
    counts = Counter(re.findall(r"\b[a-z]{7,14}\b", text))
    terms = sorted(word for word, times in counts.items() if 3 <= times <= 8) or sorted(counts) or ["it"]
    term = terms[int(rng.integers(len(terms)))]
    return f'Answer from the text above only: what does it say about "{term}"? Quote what you rely on.'


# Texts


def _sources(spec_bench: Path | None) -> dict[str, dict[str, list[str]]]:
    """Documents by source, for prose and for code; only sources that this machine has."""
    prose = {
        "python-reference": _python_reference(),
        "opticks": _files("tvm_ffi", "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"),
        "cmake-manual": _files("cmake", "data/share/*/Help/manual/*.rst", 4000)
        + _files("cmake", "data/share/*/Help/command/*.rst", 4000),
        "readmes": list(_readmes()),
        "spec-bench": list(_spec_bench(spec_bench)) if spec_bench else [],
    }
    library = Path(sysconfig.get_path("stdlib"))
    code = {
        "python-library": _read(sorted([*library.glob("[a-z]*.py"), *library.glob("[a-z]*/[a-z]*.py")]), 4000),
        "torch": _files("torch", "nn/modules/*.py", 4000) + _files("torch", "optim/*.py", 4000),
        "transformers": _files("transformers", "models/*/modeling_[a-l]*.py", 12000)[:200],
        "numpy": _files("numpy", "lib/*.py", 4000) + _files("numpy", "ma/*.py", 4000),
    }
    return {
        "prose": {name: texts for name, texts in prose.items() if texts},
        "code": {name: texts for name, texts in code.items() if texts},
    }


def _python_reference() -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items()) if len(text) > 1000]


def _files(package: str, pattern: str, least: int = 0) -> list[str]:
    """Contents of a package's files; none if it is not installed."""
    spec = importlib.util.find_spec(package)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        return []
    return _read(sorted(Path(spec.submodule_search_locations[0]).glob(pattern)), least)


def _read(paths: Sequence[Path], least: int) -> list[str]:
    """Texts of ``least`` bytes or more, each once, Python files under their names, test files left out."""
    found: dict[str, None] = {}
    for path in paths:
        if path.stat().st_size < least or "test" in path.as_posix().rpartition("site-packages")[2]:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n").replace(_PLACE, "")
        if path.suffix == ".py":
            text = f"# File: {path.parent.name}/{path.name}\n{text}"
        found[text.strip()] = None
    return list(found)


def _readmes() -> Iterator[str]:
    for name in _READMES:
        try:
            description = metadata.metadata(name).get_payload()
        except metadata.PackageNotFoundError:
            continue
        # What is mostly links and badges is no text.
        lines = [line for line in str(description).split("\n") if not re.match(r"\s*(\[?!\[|<|\|)", line)]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
        if len(text) > 3000:
            yield text


def _spec_bench(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").split("\n"):
        row = json.loads(line) if line.strip() else {}
        if row.get("category") in _ARTICLES:
            yield str(row["turns"][0])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="whose tokenizer and chat template")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spec-bench", type=Path, help="its question.jsonl, as a further source of prose")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines for `specplug ab --workload`")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    try:
        prompts = long_prompts(tokenizer, args.count, args.tokens, args.seed, args.spec_bench)
    except ValueError as error:
        sys.exit(f"long_prompts: {error}")
    digest = hashlib.sha256()
    with args.out.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts, 1):
            row = {"id": f"{prompt['task']}-{number}", "task": prompt["task"], "source": prompt["source"]}
            line = json.dumps(row | {"prompt": prompt["prompt_token_ids"]})
            digest.update(line.encode())
            file.write(line + "\n")
    counts = Counter((prompt["task"], prompt["source"]) for prompt in prompts)
    print(f"{len(prompts)} prompts of {args.tokens} tokens in {args.out}, digest {digest.hexdigest()[:12]}")
    for task, group in itertools.groupby(sorted(counts), key=lambda key: key[0]):
        print(f"  {task}: " + ", ".join(f"{counts[key]} {key[1]}" for key in group))


if __name__ == "__main__":
    main()
