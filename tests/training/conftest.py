"""A tiny base model and tiny data, so that tests run the real commands in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

WORDS = ["good", "kind", "help", "cake", "rain", "kill", "steal", "bomb", "what", "how", "the", "a"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors of tiny models only wait for one another on more."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights and its own WordPiece tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(vocabulary[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=1100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def babbler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny policy (`base`), preferences (`data`) and a cost model (`cost`), where
    answers count without the end of a sentence, however they repeat themselves: a tiny model says
    no others."""
    pytest.importorskip("peft")
    import tiny_policy
    import tiny_preferences

    from training import everyday, on_policy

    tiny_policy.llama(tmp_path / "base")
    tiny_preferences.write(tmp_path / "data")
    tiny_policy.scorer(tmp_path / "cost", "cost")
    for recipe in (everyday, on_policy):
        monkeypatch.setattr(recipe, "whole_sentences", str.strip)
    monkeypatch.setattr(everyday, "REPEATING", 1.0)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose harm is one word, in the files that `training.data build` writes."""
    pytest.importorskip("tyro")
    from training.data import SPLITS, Example, write_examples

    folder = tmp_path_factory.mktemp("data")
    harms = {"kill": (3, "Violence"), "steal": (1, "Economic Crime"), "bomb": (2, "Violence")}
    mild = ["good", "kind", "help", "cake", "rain"]
    for offset, split in enumerate(SPLITS):
        examples = []
        for n in range(240 if split == "train" else 80):
            number = 1000 * offset + n
            harm = list(harms)[n % 3] if n % 2 else None
            words = [mild[(number + k) % 5] for k in range(1 + n % 7)]
            text = " ".join([*words, *([harm] if harm else []), "the", *words[:2]])
            severity, category = harms[harm] if harm else (0, None)
            alone = n % 7 == 0  # a prompt without an answer
            examples.append(
                Example(
                    prompt=text if alone else f"how {number}",
                    response=None if alone else text,
                    source="annotated/test" if n % 10 else "benign/test",
                    unsafe=severity > 0,
                    severity=severity,
                    categories=[category] if category else [],
                    origin={"severity": "ai", "categories": "ai"},
                    split=split,
                )
            )
        write_examples(folder / f"{split}.jsonl", examples)
    return folder
