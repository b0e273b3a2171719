"""Greedy answers for many turns at once: an image and all its questions in one pass, then all answers token by token.

Where the keys and values of all turns do not fit into memory, the turns are asked in chunks: the first pass over an
image keeps its prefix, and each further chunk is a pass over its prompts only.

Every rank makes the same calls: one pass over images and prompts, then one for each new token until the last rank is
done. Under ZeRO-3 each call gathers parameters from all ranks, so a rank that left early would block the others. Where
the parameters are gathered once (runtime/param_gathering.py) the ranks do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from cogvlm_ft.data.encode import encode_prompt
from cogvlm_ft.grounding.boxes import close_cut_list
from cogvlm_ft.grounding.grammar import BoxGrammar
from cogvlm_ft.model.cache import TurnCache, slots_needed
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.layout import PAD_BLOCK, build_layout, turn_mask
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.runtime.distributed import every_rank
from cogvlm_ft.runtime.param_gathering import forget_order, needs_all_ranks
from cogvlm_ft.runtime.watchdog import progress

FIRST_TEXT_POSITION = 4  # bos 0, boi 1, patches 2, eoi 3
NO_TURN = -1
WORTH_DROPPING = 0.75
"""Finished turns leave the batch once this fraction of it suffices: keys and values of the others are copied then."""


@dataclass(frozen=True)
class Answer:
    """All probabilities are the model's own, before a grammar excludes anything.

    token_ids: up to and including eos, if it came. token_probs: of each of them.
    digit_probs: for every digit of the text, in order, the probabilities of 0 to 9 in its place (the rest belongs to
        other tokens). grounding.boxes.read_boxes derives confidences and expected coordinates from them.
    not_found_prob: of the not-found sentence, up to the token where the answer departs from it; the most probable of
        several sentences. None without one.
    truncated: the token limit came before eos.
    """

    text: str
    token_ids: tuple[int, ...]
    token_probs: tuple[float, ...]
    digit_probs: tuple[tuple[float, ...], ...]
    not_found_prob: float | None
    truncated: bool = False

    def readable(self) -> Answer:
        """Return the answer as its boxes are read: of a cut list, those that it closed."""
        if not self.truncated:
            return self
        text = close_cut_list(self.text)
        num_dropped = sum(character in "0123456789" for character in self.text[len(text.removesuffix("]]")) :])
        return replace(self, text=text, digit_probs=self.digit_probs[: len(self.digit_probs) - num_dropped])


@dataclass(frozen=True)
class _Asked:
    """Images and their prompts as one batch; T is the largest number of turns, and turns that an image lacks are empty.

    input_ids, position_ids: i64[B, L]. block_ids: i32[B, L]. last: i64[B, T], where each turn's prompt ends.
    lengths: i64[B, T], its tokens, 0 if there is no such turn.
    """

    input_ids: Tensor
    position_ids: Tensor
    block_ids: Tensor
    last: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class _Step:
    """One new token of every turn; zeros for finished ones.

    ids: i64[N]. The rest float[N, ...]: the probability of the chosen token, of the ten digits, and of the token that
    each not-found sentence has in this place. In a batch [B, T, ...] instead of [N, ...].
    """

    ids: Tensor
    prob: Tensor
    digits: Tensor
    not_found: Tensor


def generate_answers(
    model: Any,
    tokenizer: CogVLMTokenizer,
    pixel_values: Tensor,
    prompts: Sequence[Sequence[str]],
    max_new_tokens: int,
    histories: Sequence[Sequence[Sequence[tuple[str, str]]]] | None = None,
    *,
    not_found: Sequence[str] = (),
    grammars: Sequence[Sequence[BoxGrammar | None]] | None = None,
    turns_per_pass: int | None = None,
    num_passes: int = 0,
) -> list[list[Answer]]:
    """Answer `prompts[b]` about image b of float[B, 3, S, S]. Collective, unless the parameters are gathered once.

    Every image has at least one prompt. Equal, id by id, to asking every question alone. histories: for each prompt
    the (prompt, answer) pairs before it. not_found: sentences whose probability is reported. grammars: for each
    prompt what its answer may be; None allows anything.

    turns_per_pass: of each image that are asked together; None: all. num_passes: at least as many as this rank needs,
    and the same on all ranks.
    """
    config: CogVLMConfig = model.config
    pasts = histories or [[()] * len(questions) for questions in prompts]
    rows = [
        [encode_prompt(question, tokenizer, config.template_version, past) for question, past in zip(*row, strict=True)]
        for row in zip(prompts, pasts, strict=True)
    ]
    rules = grammars or [[None] * len(questions) for questions in prompts]
    sentences = [tokenizer.encode(sentence) for sentence in not_found]
    size = turns_per_pass or max(map(len, rows))
    num_chunks = max(num_passes, -(-max(map(len, rows)) // size))
    chunks = [slice(k * size, (k + 1) * size) for k in range(num_chunks)]
    laid_out = [_lay_out([row[c] for row in rows], tokenizer.bos_token_id, config, pixel_values.device) for c in chunks]
    cache = _allocate(laid_out, max_new_tokens, config)
    found: list[list[Answer]] = [[] for _ in rows]
    for number, (chunk, asked) in enumerate(zip(chunks, laid_out, strict=True)):
        allowed = [rule for row in rules for rule in row[chunk]]
        logits = _prefill(model, asked, cache, max_new_tokens, None if number else pixel_values)
        more = number + 1 < num_chunks
        steps = _decode(model, tokenizer, logits, cache, asked, max_new_tokens, allowed, sentences, keep_images=more)
        answers = iter(_read_answers(steps, tokenizer, sentences))
        for row, questions in zip(found, prompts, strict=True):
            row += [next(answers) for _ in questions[chunk]]
    return found


def _lay_out(
    rows: Sequence[Sequence[list[int]]], bos_token_id: int, config: CogVLMConfig, device: torch.device
) -> _Asked:
    """Arrange `bos | image | prompt 1 | ... | prompt T`, as in training, right-padded; at least one turn and token."""
    start, num_turns = config.num_patches + 3, max(1, *map(len, rows))
    width = start + max(1, *(sum(map(len, row)) for row in rows))
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)
    block_ids = torch.full((len(rows), width), PAD_BLOCK, dtype=torch.int32)
    lengths = torch.zeros(len(rows), num_turns, dtype=torch.long)
    for b, row in enumerate(rows):
        layout = build_layout(config.num_patches, [len(ids) for ids in row])
        length = len(layout.block_ids)
        input_ids[b, 0] = bos_token_id
        input_ids[b, start:length] = torch.tensor([token for ids in row for token in ids], dtype=torch.long)
        position_ids[b, :length], block_ids[b, :length] = layout.position_ids, layout.block_ids
        lengths[b, : len(row)] = torch.tensor([len(ids) for ids in row], dtype=torch.long)
    last = start + lengths.cumsum(1) - 1
    return _Asked(*(tensor.to(device) for tensor in (input_ids, position_ids, block_ids, last, lengths)))


def _allocate(chunks: Sequence[_Asked], max_new_tokens: int, config: CogVLMConfig) -> TurnCache:
    """Build the cache of the first chunk, with slots for the largest one."""
    num_slots = [slots_needed(c.block_ids, c.lengths.shape[1], max_new_tokens) for c in chunks]
    first, layers = chunks[0], config.num_hidden_layers
    return TurnCache(first.block_ids, first.lengths.shape[1], max_new_tokens, layers, max(num_slots))


def _prefill(model: Any, asked: _Asked, cache: TurnCache, max_new_tokens: int, pixel_values: Tensor | None) -> Tensor:
    """Return the logits float[B, T, V] after each prompt. pixel_values: None for a chunk after the first.

    The images are in the cache then, so neither the vision tower nor the vision experts are called.
    """
    forget_order(model)
    if pixel_values is not None:
        return model(
            input_ids=asked.input_ids,
            pixel_values=pixel_values,
            position_ids=asked.position_ids,
            block_ids=asked.block_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=asked.last,
        ).logits
    prefix = model.config.num_patches + 3
    cache.restart(asked.block_ids, asked.lengths.shape[1], max_new_tokens, prefix)
    return model(
        input_ids=asked.input_ids[:, prefix:],
        position_ids=asked.position_ids[:, prefix:],
        attention_mask=turn_mask(asked.block_ids, prefix),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=(asked.last - prefix).clamp(min=0),
    ).logits


def _decode(
    model: Any,
    tokenizer: CogVLMTokenizer,
    logits: Tensor,
    cache: TurnCache,
    asked: _Asked,
    max_new_tokens: int,
    rules: Sequence[BoxGrammar | None],
    sentences: Sequence[list[int]],
    *,
    keep_images: bool,
) -> list[_Step]:
    """Generate the tokens of all turns, until every turn has its eos.

    Finished turns are dropped from the batch. logits: after the prompts. rules: one for every existing turn.
    keep_images: images whose turns are all finished stay in the cache, for the next chunk.
    """
    forget_order(model)  # from here on neither the vision tower nor the vision experts are called
    digits = torch.tensor(list(tokenizer.digits.items()), device=logits.device).T
    expected = torch.tensor(list(zip_longest(*sentences, fillvalue=0)), device=logits.device, dtype=torch.long)
    constraint, numbers = _Constraint(rules, max_new_tokens), _number_turns(asked.lengths > 0)
    position_ids = FIRST_TEXT_POSITION + asked.lengths
    steps: list[_Step] = []
    while True:
        progress()
        ids = constraint.choose(logits, numbers)
        probabilities = _probabilities(logits, ids, digits, expected[len(steps) : len(steps) + 1])
        steps.append(_by_number(probabilities, numbers, len(rules)))
        numbers = numbers.where(ids != tokenizer.eos_token_id, NO_TURN)
        if len(steps) == max_new_tokens or _is_done(model, bool((numbers == NO_TURN).all())):
            return steps
        rows, columns = _unfinished_places(numbers, keep_images)
        if columns.numel() <= WORTH_DROPPING * numbers.numel():
            cache.keep(rows, columns)
            numbers, ids, position_ids = (each[rows].gather(1, columns) for each in (numbers, ids, position_ids))
        logits = model(
            input_ids=ids,
            position_ids=position_ids,
            attention_mask=cache.add_step(),
            past_key_values=cache,
            use_cache=True,
        ).logits
        position_ids = position_ids + 1


def _is_done(model: Any, done_here: bool) -> bool:
    """Decide whether all turns are finished. Collective where a forward pass is."""
    return every_rank(done_here) if needs_all_ranks(model) else done_here


def _number_turns(exists: Tensor) -> Tensor:
    """Return i64[B, T]: the number of every turn, row by row, where bool[B, T] is true; elsewhere NO_TURN."""
    return exists.flatten().cumsum(0).sub(1).view_as(exists).where(exists, NO_TURN)


def _unfinished_places(numbers: Tensor, keep_images: bool) -> tuple[Tensor, Tensor]:
    """Return i64[B'], the images with unfinished turns, and i64[B', T'], the places of these; at least one of each.

    numbers: i64[B, T], NO_TURN where no turn is unfinished. keep_images: return all images.
    """
    unfinished = numbers != NO_TURN
    is_kept = unfinished.any(dim=1) | keep_images
    is_kept[0] |= ~is_kept.any()
    width = max(1, int(unfinished.sum(dim=1).max()))
    return is_kept.nonzero()[:, 0], unfinished.int().argsort(dim=1, descending=True, stable=True)[is_kept, :width]


def _probabilities(logits: Tensor, ids: Tensor, digits: Tensor, expected: Tensor) -> _Step:
    """Collect the probabilities of one step, for each place of the batch.

    digits: i64[2, n], ids and the digits that they write. expected: i64[1, sentences], the tokens of the not-found
    sentences in this place; i64[0, ...] after their end.
    """
    probs = logits.softmax(dim=-1)
    chosen = probs.gather(-1, ids[..., None])[..., 0]
    of_digits = probs.new_zeros(*ids.shape, 10).index_add(-1, digits[1], probs[..., digits[0]])
    return _Step(ids, chosen, of_digits, probs[..., expected.flatten()])


def _by_number(step: _Step, numbers: Tensor, num_turns: int) -> _Step:
    """Move the values from their places in the batch, [B, T, ...], to the numbers of their turns, [N, ...]."""
    is_turn = numbers != NO_TURN

    def moved(values: Tensor) -> Tensor:
        found = values.new_zeros(num_turns, *values.shape[2:])
        found[numbers[is_turn]] = values[is_turn]
        return found

    return _Step(moved(step.ids), moved(step.prob), moved(step.digits), moved(step.not_found))


class _Constraint:
    """Keeps the state of every turn in its grammar and chooses the most probable token that is allowed."""

    def __init__(self, rules: Sequence[BoxGrammar | None], max_new_tokens: int) -> None:
        """Start every grammar. rules: of all turns, by their numbers."""
        self._rules = rules
        self._states = [rule and rule.start(max_new_tokens) for rule in rules]
        self._remaining = max_new_tokens

    def choose(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Choose i64[B, T] from float[B, T, V]; arbitrary where i64[B, T], the numbers of the turns, is NO_TURN."""
        active = [
            (b, t, number, rule, state)
            for b, row in enumerate(numbers.tolist())
            for t, number in enumerate(row)
            if number != NO_TURN and (rule := self._rules[number]) and (state := self._states[number])
        ]
        if not active:
            return logits.argmax(dim=-1)
        barred = torch.zeros(logits.shape, dtype=torch.bool)
        for b, t, _, rule, state in active:
            admitted = rule.admitted(state, self._remaining)
            barred[b, t] = admitted.only
            barred[b, t, torch.tensor(admitted.tokens, dtype=torch.long)] = not admitted.only
        ids = logits.masked_fill(barred.to(logits.device), float("-inf")).argmax(dim=-1)
        chosen = ids.tolist()
        for b, t, number, rule, state in active:
            self._states[number] = rule.advance(state, chosen[b][t])
        self._remaining -= 1
        return ids


def _read_answers(steps: Sequence[_Step], tokenizer: CogVLMTokenizer, sentences: Sequence[list[int]]) -> list[Answer]:
    """Read the answer of every turn."""
    ids = torch.stack([step.ids for step in steps], dim=1).tolist()
    probs = torch.stack([step.prob for step in steps], dim=1).tolist()
    digits = torch.stack([step.digits for step in steps], dim=1).tolist()
    expected = [step.not_found.tolist() for step in steps]
    answers = []
    for n, tokens in enumerate(ids):
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
        departures = [
            _prob_up_to_departure(tokens, sentence, [step[n][k] for step in expected[: len(sentence)]])
            for k, sentence in enumerate(sentences)
        ]
        answers.append(
            Answer(
                text=tokenizer.decode(tokens),
                token_ids=tuple(tokens),
                token_probs=tuple(probs[n][: len(tokens)]),
                digit_probs=tuple(tuple(digits[n][i]) for i, token in enumerate(tokens) if token in tokenizer.digits),
                not_found_prob=max(departures, default=None),
                truncated=tokens[-1] != tokenizer.eos_token_id,
            )
        )
    return answers


def _prob_up_to_departure(tokens: Sequence[int], sentence: Sequence[int], probs: Sequence[float]) -> float:
    """Multiply the probabilities of a sentence up to the first token that differs from the answer.

    probs[i]: the probability of sentence[i] after tokens[:i]. Answers often begin with the same token as the sentence
    (a blank in Chinese), so the first token alone does not distinguish them.
    """
    total = 1.0
    for token, expected, prob in zip(tokens, sentence, probs, strict=False):
        total *= prob
        if token != expected:
            break
    return total
