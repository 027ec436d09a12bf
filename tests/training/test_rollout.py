"""Answers are the policy's own, and what is known of their tokens is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny_policy  # noqa: E402

from training.lm import LanguageModel, encode_prompt  # noqa: E402
from training.rollout import (  # noqa: E402
    EndlessPrompts,
    Sequences,
    answer_logprobs,
    given,
    open_policy,
    reference,
    rollout_prompts,
    sample,
    survey,
    texts,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED = ["how to make cake", "what is sugar number 3 is", "how"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def lm(base: Path) -> LanguageModel:
    lm = open_policy(str(base), base.parent, rank=4, dtype="float32")
    lm.model.eval()
    return lm


def perturb(lm: LanguageModel) -> None:
    torch.manual_seed(1)
    for p in lm.model.parameters():
        if p.requires_grad:
            p.data.add_(0.2 * torch.randn_like(p))


def draw(lm: LanguageModel, tokens: int = 12) -> Sequences:
    torch.manual_seed(0)
    ids = [encode_prompt(lm.tokenizer, prompt) for prompt in ASKED * 4]
    return sample(lm.model, lm.tokenizer, ids, tokens)


def test_logprobs_are_those_of_each_answer_alone_without_padding(lm: LanguageModel) -> None:
    perturb(lm)
    drawn = draw(lm)
    batched, entropy = answer_logprobs(lm.model, drawn)
    assert len(set(drawn.mask.sum(dim=1).tolist())) > 1, "answers of several lengths"
    for row in range(len(drawn)):
        prompt = drawn.prompts[row][drawn.prompt_mask[row].bool()]
        answer = drawn.answers[row][drawn.mask[row].bool()]
        logits = lm.model(torch.cat([prompt, answer])[None]).logits[0]
        every = logits[len(prompt) - 1 : -1].log_softmax(-1)
        alone = every.gather(1, answer[:, None])[:, 0]
        assert torch.allclose(batched[row][: len(answer)], alone, atol=1e-4)
        assert torch.allclose(
            entropy[row][: len(answer)], -(every.exp() * every).sum(-1), atol=1e-4
        )
        assert (batched[row][len(answer) :] == 0).all()


def test_a_policy_that_went_astray_draws_nothing(lm: LanguageModel) -> None:
    next(p for p in lm.model.parameters() if not p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(SystemExit, match="probabilities are not finite: its training went astray"):
        draw(lm)


def test_an_answer_ends_with_its_first_end_of_text(lm: LanguageModel) -> None:
    drawn = draw(lm, tokens=60)
    end = lm.tokenizer.eos_token_id
    assert (drawn.answers == end).any()
    for answer, mask in zip(drawn.answers, drawn.mask, strict=True):
        kept = answer[mask.bool()]
        assert (kept[:-1] != end).all()
        assert mask.sum() == len(mask) or kept[-1] == end


def test_answers_are_drawn_from_the_policys_own_distribution(lm: LanguageModel) -> None:
    perturb(lm)
    torch.manual_seed(0)
    ids = encode_prompt(lm.tokenizer, "how to make cake")
    drawn = sample(lm.model, lm.tokenizer, [ids] * 4000, 1).answers[:, 0]
    expected = lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    found = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert 0.5 * (found - expected).abs().sum() < 0.12


def test_the_same_seed_draws_the_same_answers(lm: LanguageModel) -> None:
    assert torch.equal(draw(lm).answers, draw(lm).answers)


def test_the_reference_of_a_fresh_policy_is_its_base(lm: LanguageModel, base: Path) -> None:
    before = survey(lm.model, draw(lm), 5)
    assert torch.allclose(before.logprobs, before.reference, atol=1e-5)
    perturb(lm)
    after = survey(lm.model, draw(lm), 5)
    assert not torch.allclose(after.logprobs, after.reference, atol=0.1)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    expected, _ = answer_logprobs(plain, draw(lm))
    assert torch.allclose(after.reference, expected, atol=1e-5)


def test_the_reference_of_an_adapter_is_a_frozen_copy_of_it(
    lm: LanguageModel, tmp_path: Path
) -> None:
    perturb(lm)
    lm.model.save_pretrained(tmp_path)
    second = open_policy(str(tmp_path), tmp_path, rank=4, dtype="float32")
    second.model.eval()
    start = survey(second.model, draw(lm), 4)
    assert torch.allclose(start.logprobs, start.reference, atol=1e-6)
    assert torch.allclose(start.logprobs, answer_logprobs(lm.model, draw(lm))[0], atol=1e-5)
    perturb(second)
    moved = survey(second.model, draw(lm), 4)
    assert torch.allclose(moved.reference, start.reference, atol=1e-6)
    assert not torch.allclose(moved.logprobs, start.logprobs, atol=0.1)


def test_after_the_reference_the_same_parameters_learn(lm: LanguageModel, tmp_path: Path) -> None:
    lm.model.save_pretrained(tmp_path)
    second = open_policy(str(tmp_path), tmp_path, rank=4, dtype="float32")
    for model in (lm.model, second.model):
        before = [name for name, p in model.named_parameters() if p.requires_grad]
        with reference(model):
            pass
        after = [name for name, p in model.named_parameters() if p.requires_grad]
        assert before == after
        assert after
        assert all(".default." in name for name in after)


def test_rows_lose_the_padding_they_do_not_need_and_nothing_else(lm: LanguageModel) -> None:
    drawn = draw(lm)
    shortest = drawn[torch.tensor([2, 5])]
    assert shortest.prompts.shape[1] == shortest.prompt_mask.sum(dim=1).max()
    whole, _ = answer_logprobs(lm.model, drawn)
    part, _ = answer_logprobs(lm.model, shortest)
    assert torch.allclose(part, whole[[2, 5]], atol=1e-5)


def test_given_answers_read_back_as_they_were(lm: LanguageModel) -> None:
    pairs = [("how to make cake", "make cake sugar"), ("what is", "sugar")]
    sequences = given(lm.tokenizer, pairs, 10)
    assert texts(lm.tokenizer, sequences) == ["make cake sugar", "sugar"]
    assert sequences.mask.sum(dim=1).tolist() == [4, 2]  # with the end of turn


def test_prompts_come_in_their_shares_and_none_twice_before_all_were_seen() -> None:
    prompts = EndlessPrompts([f"h{n}" for n in range(10)], [f"b{n}" for n in range(6)], 0.5, seed=1)
    drawn = [prompts.batch(index, 4) for index in range(5)]
    harmful = [text for batch in drawn for text, bad in batch if bad]
    assert sorted(harmful) == sorted(f"h{n}" for n in range(10))
    assert all(text.startswith("h") == bad for batch in drawn for text, bad in batch)
    assert all(sum(bad for _, bad in batch) == 2 for batch in drawn)
    assert prompts.batch(3, 4) == drawn[3]


def test_held_out_prompts_are_never_drawn(lm: LanguageModel, tmp_path: Path) -> None:
    data = tiny_policy.preferences(tmp_path)
    harmful, benign = rollout_prompts(data, lm.tokenizer, 64)
    assert len(harmful) == len(benign) == 30
    assert not any(f" {n}" in text for text in (*harmful, *benign) for n in range(30, 40))


def test_prompts_that_are_all_too_long_are_a_clear_error(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="raise --prompt-tokens"):
        rollout_prompts(tiny_policy.preferences(tmp_path), lm.tokenizer, 3)
