"""EleutherAI's lm_eval scores a saved folder as Transformers scores the model: choices, log-likelihoods, perplexities.

It reads two tasks of real text, written here, and no network. To install: pip install -c constraints.txt "lm-eval[hf]"
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_model, train_steps
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_compressm.surgery.shrink_and_grow import shrink_state
from hf_compressm.theory.plan import Selection

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

END_OF_TEXT = "<|endoftext|>"
CHOICES = 4
TASKS = {
    "verses_choice": """
        task: verses_choice
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: "{data}"}}}}
        test_split: test
        output_type: multiple_choice
        doc_to_text: question
        doc_to_choice: choices
        doc_to_target: answer
        metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
        """,
    "verses_perplexity": """
        task: verses_perplexity
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: "{data}"}}}}
        test_split: test
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: text
        metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
        """,
}


@pytest.fixture(scope="module")
def tokenizer(verses) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(verses, vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


@pytest.fixture(scope="module")
def questions(verses) -> list[dict]:
    """Twenty verses cut at their first comma: which four words go on? (Of whole ends, the shortest always wins.)"""
    starts, ends = zip(*(verse.split(", ", 1) for verse in verses if ", " in verse), strict=True)
    ends = [" ".join(end.split()[:4]) for end in ends]
    questions = []
    for i in range(20):
        answer = i % CHOICES
        choices = [ends[i + 100 * ((k - answer) % CHOICES)] for k in range(CHOICES)]
        questions.append({"question": starts[i] + ",", "choices": choices, "answer": answer})
    return questions


@pytest.fixture(scope="module")
def documents(verses) -> list[dict]:
    """Texts of one to twelve verses, so that a batch is padded."""
    return [{"text": " ".join(verses[100 * n : 100 * n + n])} for n in (1, 2, 5, 12)]


def train_a_little(model: PreTrainedModel, tokenizer, verses) -> None:
    """Enough for the scores to depend on the text."""
    ids = torch.tensor(tokenizer(" ".join(verses))["input_ids"][: 60 * 8 * 32]).view(60, 8, 32)
    train_steps(model, torch.optim.AdamW(model.parameters(), lr=5e-3), [{"input_ids": i, "labels": i} for i in ids])


def uniform_folder(folder: Path, tokenizer, verses) -> PreTrainedModel:
    """A MambaForCausalLM, trained a little and saved; the model that was saved."""
    model = build_model(state_size=8)
    train_a_little(model, tokenizer, verses)
    model.save_pretrained(folder)
    return model


def per_layer_folder(folder: Path, tokenizer, verses) -> PreTrainedModel:
    """A model whose layers differ in state size, saved with its own code; the model that was saved."""
    model = build_model(state_size=8)
    train_a_little(model, tokenizer, verses)
    shrink_state(model, {0: Selection(torch.arange(8)), 1: Selection(torch.tensor([0, 2, 5]))})
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("save", "flags"),
    [
        pytest.param(uniform_folder, [], id="uniform"),
        pytest.param(per_layer_folder, ["--trust_remote_code"], id="per layer"),
    ],
)
def test_lm_eval_reports_the_scores_of_the_saved_model(
    tmp_path, tokenizer, verses, questions, documents, save: Callable, flags
):
    model = save(tmp_path / "model", tokenizer, verses).eval()
    tokenizer.save_pretrained(tmp_path / "model")
    write_task(tmp_path, "verses_choice", questions)
    write_task(tmp_path, "verses_perplexity", documents)
    results, samples = run_lm_eval(tmp_path, *flags)

    expected = choice_log_likelihoods(model, tokenizer, questions)
    reported = torch.tensor([[float(score) for score, _ in s["filtered_resps"]] for s in samples], dtype=torch.float64)
    torch.testing.assert_close(reported, expected, rtol=1e-5, atol=1e-3)
    answers = torch.tensor([question["answer"] for question in questions])
    characters = torch.tensor([[len(choice) for choice in question["choices"]] for question in questions])
    assert 0 < accuracy(expected, answers) < 1  # or it would prove little
    assert results["verses_choice"]["acc,none"] == accuracy(expected, answers)
    assert results["verses_choice"]["acc_norm,none"] == accuracy(expected / characters, answers)

    perplexities = results["verses_perplexity"]
    total = sum(document_log_likelihood(model, tokenizer, document["text"]) for document in documents)
    words = sum(len(re.split(r"\s+", document["text"])) for document in documents)
    size = sum(len(document["text"].encode()) for document in documents)
    assert perplexities["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert perplexities["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert perplexities["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


def write_task(folder: Path, name: str, examples: list[dict]) -> None:
    data = folder / "tasks" / f"{name}.jsonl"
    data.parent.mkdir(exist_ok=True)
    data.write_text("\n".join(json.dumps(example) for example in examples))
    data.with_suffix(".yaml").write_text(TASKS[name].format(data=data))


def run_lm_eval(folder: Path, *flags: str) -> tuple[dict, list[dict]]:
    """(task → metric → value, the samples of verses_choice in order) from the command line, without a network."""
    command = f"""
        -m lm_eval --model hf --model_args pretrained={folder / "model"},dtype=float32 --tasks {",".join(TASKS)}
        --include_path {folder / "tasks"} --device cpu --batch_size 4 --log_samples --output_path {folder / "scores"}
        """
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    subprocess.run(
        [sys.executable, *command.split(), *flags],
        check=True,
        cwd=folder,
        env=os.environ | offline,
        stdin=subprocess.DEVNULL,  # a question about remote code is an error, not a wait
        timeout=300,
    )
    (results,) = (folder / "scores").glob("*/results_*.json")
    (samples,) = (folder / "scores").glob("*/samples_verses_choice_*.jsonl")
    ordered = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"], ordered


def choice_log_likelihoods(model, tokenizer, questions) -> torch.Tensor:
    """log p(choice | question), (questions, choices); lm_eval puts a space between the two."""

    def score(question: str, choice: str) -> float:
        return log_likelihood(model, tokenizer(question)["input_ids"], tokenizer(" " + choice)["input_ids"])

    rows = [[score(question["question"], choice) for choice in question["choices"]] for question in questions]
    return torch.tensor(rows, dtype=torch.float64)


def document_log_likelihood(model, tokenizer, text: str) -> float:
    """log p(text) after one start token, in one window: lm_eval's windows are 2048 tokens where no length is set."""
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) <= 2048
    return log_likelihood(model, [tokenizer.bos_token_id], tokens)


@torch.no_grad()
def log_likelihood(model, context: list[int], continuation: list[int]) -> float:
    """Σ log p(token | all before it) over the continuation; one sequence at a time, no padding."""
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    return -cross_entropy(logits.double(), torch.tensor(continuation), reduction="sum").item()


def accuracy(scores: torch.Tensor, answers: torch.Tensor) -> float:
    return (scores.argmax(dim=1) == answers).double().mean().item()
