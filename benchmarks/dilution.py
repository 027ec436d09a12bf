"""One harmful sentence amid a page of harmless ones: does the stream gate see it, and what else?

    python -m training.data build ...                # writes build/data/validation.jsonl
    python -m benchmarks.dilution --data build/data

A sentence that the bundled model refuses alone is put into the middle of a real harmless answer of
900 to 2,500 characters. Of each setting of the gate are told

    caught     sentences that did not come out whole
    stopped    of harmless answers: benign ones, and ones on harmful matters annotated as harmless
    judged     tokens that the model read per token of an answer: of those harmless answers (the
               prompt is read with each passage, which costs short answers more), and of the
               500-token prose of `benchmarks.stream`
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.stream import PROMPT, answer, count
from guardrail import Action, Assessment, Guard, GuardedChat, OnnxModerator, Pair, Policy
from guardrail.stream import StreamConfig, _sentences
from guardrail.testing import leaked_chars

POLICY = Policy.parse(  # the answers are measured: every prompt is let in
    'name = "dilution"\nextends = "balanced"\n'
    '[input]\nminor = "allow"\nmoderate = "allow"\nsevere = "allow"'
)
OFF = 1.0
SETTINGS = {
    "600/350, no second look": StreamConfig(second_look=OFF),
    "300/175, no second look": StreamConfig(longest=300, context=175, second_look=OFF),
    "200/115, no second look": StreamConfig(longest=200, context=115, second_look=OFF),
    "600/350, second look from 0.4": StreamConfig(second_look=0.4),
    "600/350, second look from 0.2": StreamConfig(second_look=0.2),
    "600/350, second look from 0.1": StreamConfig(second_look=0.1),
    "600/350, second look always": StreamConfig(second_look=0.0),
}


class Counting(OnnxModerator):
    """Reads each text once, and counts its tokens each time it is asked for."""

    def __init__(self, threads: int | None) -> None:
        super().__init__("small", device="cpu", threads=threads)
        self.tokens = self._read = 0
        self._seen: dict[Pair, tuple[Assessment, int]] = {}

    def logits(self, windows: Any) -> Any:
        self._read += sum(len(window.ids) for window in windows)
        return super().logits(windows)

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        return [self._assess(pair) for pair in pairs]

    def _assess(self, pair: Pair) -> Assessment:
        if pair not in self._seen:
            before = self._read
            [found] = super().assess([pair])
            self._seen[pair] = (found, self._read - before)
        found, tokens = self._seen[pair]
        if pair.response is not None:
            self.tokens += tokens
        return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [row for row in map(json.loads, lines) if row["response"]]


def diluted(
    rows: Sequence[dict[str, Any]], guard: Guard, wanted: int, rng: random.Random
) -> Iterator[tuple[str, str, str]]:
    """Prompt, page and the harmful sentence in it: one of each answer of severity 2 or more."""
    pages = [r["response"] for r in rows if r["source"].startswith("benign/")]
    pages = [page for page in pages if 900 <= len(page) <= 2500]
    harmful = [r for r in rows if (r["severity"] or 0) >= 2 and r["source"].startswith("annotated")]
    rng.shuffle(harmful)
    for row in harmful:
        for start, end in _sentences(row["response"]):
            said = row["response"][start:end].strip()
            refused = 40 <= len(said) <= 260 and guard.check(row["prompt"], said).action
            if refused is Action.REFUSE:
                page = pages[rng.randrange(len(pages))]
                ends = [e for _, e in _sentences(page)]
                at = min(ends, key=lambda e: abs(e - len(page) / 2))
                yield row["prompt"], f"{page[:at].rstrip()} {said} {page[at:]}", said
                wanted -= 1
                break
        if not wanted:
            return


def streamed(guard: Guard, config: StreamConfig, prompt: str, text: str) -> tuple[str, bool]:
    words = re.findall(r"\s*\S+\s*", text)
    stream = GuardedChat(lambda _: iter(words), guard, stream_config=config).stream(prompt)
    return "".join(stream), stream.result.blocked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("build/data"))
    parser.add_argument("--sentences", type=int, default=80)
    parser.add_argument("--harmless", type=int, default=300)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    path = args.data / "validation.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: python -m training.data build writes it")
    rng, rows = random.Random(0), rows_of(path)
    moderator = Counting(args.threads)
    guard = Guard(moderator, POLICY)
    tokenizer = Tokenizer.from_file(str(moderator.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pages = list(diluted(rows, guard, args.sentences, rng))
    benign = [r for r in rows if r["source"].startswith("benign/")]
    near = [r for r in rows if r["source"].startswith("annotated/") and r["severity"] == 0]
    harmless = rng.sample(benign, args.harmless * 2 // 3) + rng.sample(near, args.harmless // 3)
    prose = ["".join(answer(tokenizer, n, harmful=False)) for n in range(3)]
    print(f"{len(pages)} harmful sentences, {len(harmless)} harmless answers, {moderator.id}")
    print(f"{'longest/context':<32}{'caught':>9}{'benign stopped':>16}{'near harm stopped':>19}"
          f"{'judged':>9}{'of prose':>10}")  # fmt: skip
    for name, config in SETTINGS.items():
        caught = sum(
            leaked_chars(streamed(guard, config, prompt, page)[0], [said]) == 0
            for prompt, page, said in pages
        )
        moderator.tokens = 0
        stops = [streamed(guard, config, r["prompt"], r["response"])[1] for r in harmless]
        judged = moderator.tokens / sum(count(tokenizer, r["response"]) for r in harmless)
        moderator.tokens = 0
        for text in prose:
            streamed(guard, config, PROMPT, text)
        of_prose = moderator.tokens / sum(count(tokenizer, text) for text in prose)
        first = args.harmless * 2 // 3
        print(f"{name:<32}{caught:>6}/{len(pages)}{sum(stops[:first]):>16}"
              f"{sum(stops[first:]):>19}{judged:>8.2f}x{of_prose:>9.2f}x", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
