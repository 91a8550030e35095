"""What the plain computations start from: a fact as token ids, the level of the noise, and the corrupted runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A fact as token ids: the prompt, its subject's tokens start..end-1, and the target that follows the prompt."""

    fact_id: str
    prompt: list[int]
    target: list[int]
    start: int
    end: int

    @property
    def inputs(self) -> list[int]:
        """What the model reads: the last target token is only predicted."""
        return self.prompt + self.target[:-1]


@dataclass(frozen=True)
class Corruption:
    """How the corrupted runs differ from the clean one.

    They read ``inputs``, and at the tokens start..end-1 one sample of ``noise`` (J, span, width) is added to their
    embeddings, or with ``replaces`` stands in their place.
    """

    inputs: list[int]
    start: int
    end: int
    noise: Tensor
    replaces: bool = False

    def __call__(self, embeddings: Tensor) -> None:
        """Corrupt the embeddings (J, T, width) of J runs."""
        subject = embeddings[:, self.start : self.end]
        noise = self.noise.to(subject.device)
        subject[:] = noise if self.replaces else subject.double() + noise


def encode(model: nn.Module, tokenizer: Any, fact: Any, target: str) -> Case:
    """Token ids of prompt and target; the subject's tokens are those whose characters overlap its own."""
    prompt, span = encode_prompt(tokenizer, fact)
    if target == "label":
        target_ids = answer_ids(tokenizer, fact, prompt)
    else:
        with torch.no_grad():
            logits = model(torch.tensor([prompt], device=model.device)).logits
        target_ids = [int(logits[0, -1].argmax())]
    return Case(fact.id, prompt, target_ids, span[0], span[-1] + 1)


def filled(fact: Any) -> str:
    """The prompt with its subject; spaces at its end belong to the answer, and are cut."""
    text = fact.prompt.replace("{}", fact.subject)
    return text if fact.joiner == "none" else re.sub(r"[^\S\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+\Z", "", text)


def answer_ids(tokenizer: Any, fact: Any, prompt: list[int]) -> list[int]:
    """Ids of the answer: those that it has in the joined text where this begins with the prompt's, else those that it
    has alone."""
    text, answer = filled(fact), fact.target_true
    spaceless = re.match(r"[^\w]*[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]", answer)
    opened = re.search(r"(\s|[(\[{«„“‘「『（]|(\A|[\s(\[{])[\"'`»])\Z", text)  # noqa: RUF001
    joined = {"space": True, "none": False, "auto": not (spaceless or opened)}[fact.joiner]
    answer = answer if fact.joiner == "none" else answer.removeprefix(" ")
    whole = tokenizer(text + " " * joined + answer)["input_ids"]
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return whole[len(prompt) :]
    return alone(tokenizer, " " * joined + answer)


def alone(tokenizer: Any, answer: str) -> list[int]:
    """Ids of an answer by itself; where the tokenizer would begin it with a space of its own, what is left of a line
    break and the answer without the line break."""
    if answer.startswith(" "):
        marks = tokenizer.tokenize("a")[0].startswith("▁")
        return tokenizer(answer[1:] if marks else answer, add_special_tokens=False)["input_ids"]
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    both = tokenizer("\n" + answer, add_special_tokens=False)["input_ids"]
    assert both[: len(line)] == line
    return both[len(line) :]


def encode_prompt(tokenizer: Any, fact: Any) -> tuple[list[int], list[int]]:
    """Token ids of the filled prompt, and the subject's places among them."""
    first = fact.prompt.index("{}")
    last = first + len(fact.subject)
    encoding = tokenizer(filled(fact), return_offsets_mapping=True)
    span = [i for i, (begin, stop) in enumerate(encoding["offset_mapping"]) if begin < last and stop > first]
    return encoding["input_ids"], span


def noise_width(model: nn.Module, tokenizer: Any, facts: Iterable[Any], sigma: float | str) -> float:
    """Sigma as a number: "<k>sd" is k standard deviations of the embeddings of all subjects."""
    if not isinstance(sigma, str):
        return float(sigma)
    ids = [token for fact in facts for token in tokenizer(fact.subject)["input_ids"]]
    embeddings = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
    return float(sigma.removesuffix("sd")) * float(embeddings.detach().double().std())


def draw(model: nn.Module, case: Case, samples: int, seed: int) -> Tensor:
    """Standard normal noise (J, span, width of the embeddings), a fresh stream for every fact."""
    shape = (samples, case.end - case.start, model.get_input_embeddings().embedding_dim)
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def corruption(
    model: nn.Module,
    tokenizer: Any,
    fact: Any,
    case: Case,
    noise: Any,
    samples: int,
    sigma: float,
    seed: int,
    extra_tokens: int = 0,
    draws: int = 1,
) -> Corruption:
    """The corrupted runs of a fact: by ``noise`` (None: Gaussian, added), of which the last of ``draws`` from one
    stream is taken, or by another subject."""
    kind = "gaussian" if noise is None else noise.kind
    width = model.get_input_embeddings().embedding_dim
    if kind == "counterfactual":
        return counterfactual(tokenizer, fact, case, width)
    end = min(case.end + extra_tokens, len(case.prompt))
    shape = (samples, end - case.start, width)
    stream = np.random.RandomState(seed)
    for _ in range(draws):
        eps = stream.uniform(-1, 1, shape) if kind == "uniform" else stream.randn(*shape)
    values = sigma * eps if kind in ("gaussian", "uniform") else correlated(eps, noise.mean, noise.covariance)
    if kind == "t":
        values *= heaviness(noise.dof, shape[:2], seed + 1)[:, :, None]
    replaces = noise is not None and noise.replace
    return Corruption(case.inputs, case.start, end, torch.from_numpy(values), replaces)


def correlated(eps: np.ndarray, mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> np.ndarray:
    """Standard normal vectors (..., width) turned into ones of this mean and covariance."""
    _, variances, directions = np.linalg.svd(np.asarray(covariance, dtype=np.float64))
    return np.asarray(mean, dtype=np.float64) + (eps * np.sqrt(variances)) @ directions


def heaviness(dof: float, shape: tuple[int, int], seed: int) -> np.ndarray:
    """The factor (J, span) that turns a Gaussian into a t distribution of the same covariance, one per vector."""
    u = np.random.RandomState(seed).chisquare(dof, size=shape[0] * shape[1]).reshape(shape)
    return np.sqrt((dof - 2) / u)


def counterfactual(tokenizer: Any, fact: Any, case: Case, width: int) -> Corruption:
    """One run of the same prompt about another subject, without noise, before the same target."""
    prompt, _ = encode_prompt(tokenizer, dataclasses.replace(fact, subject=fact.counterfactual_subject))
    assert len(prompt) == len(case.prompt), f"fact {fact.id!r}: the counterfactual prompt has another length"
    silence = torch.zeros(1, case.end - case.start, width, dtype=torch.float64)
    return Corruption(prompt + case.target[:-1], case.start, case.end, silence)
