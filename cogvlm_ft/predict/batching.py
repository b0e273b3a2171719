"""Answer the questions of several clients together: a queue with a bounded wait, and one thread that has the model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby

from PIL import Image

from cogvlm_ft.predict.files import MAX_QUESTIONS, Question
from cogvlm_ft.predict.replies import Reply

BATCH_SIZE = 8
"""Maximum number of photos that are answered together."""
WAIT_S = 0.02
"""Longest wait for further questions while fewer photos are waiting."""

MAX_UNANSWERED = 64
"""Maximum number of orders that wait or are being answered; more are refused."""

Replies = list[list[Reply]]
"""For each question one reply, or one for each of its steps."""
Answer = Callable[[Hashable, Sequence[Image.Image], Sequence[Sequence[Question]]], list[Replies]]


@dataclass(frozen=True)
class Order:
    """Questions about one photo.

    photo_id: equal for equal photos, which are then passed through the model once. settings: only orders with equal
    ones are answered together.
    """

    photo: Image.Image
    photo_id: str
    questions: Sequence[Question]
    settings: Hashable = None
    found: Future[Replies] = field(default_factory=Future)


class BusyError(Exception):
    """Too many orders wait already."""


class AnswerQueue:
    """Answers orders in the sequence of their arrival, as many together as wait or arrive within a moment."""

    def __init__(self, answer: Answer, *, batch_size: int = BATCH_SIZE, wait_s: float = WAIT_S) -> None:
        """Start the thread. answer(settings, photos, questions) is called by it alone."""
        self._answer = answer
        self._batch_size, self._wait_s = batch_size, wait_s
        self._waiting: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(MAX_UNANSWERED)
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> Future[Replies]:
        """Return the future replies to an order. Raises BusyError."""
        if not self._places.acquire(blocking=False):
            raise BusyError(f"{MAX_UNANSWERED} questions are waiting already. Ask again in a minute")
        order.found.add_done_callback(lambda _: self._places.release())
        self._waiting.put(order)
        return order.found

    def close(self) -> None:
        """End the thread after the orders that wait."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, is_closed = self._collect(first)
            batch.sort(key=lambda order: hash(order.settings))  # stable: otherwise in the sequence of arrival
            for _, same in groupby(batch, key=lambda order: order.settings):
                self._serve([order for order in same if order.found.set_running_or_notify_cancel()])
            if is_closed:
                return

    def _collect(self, first: Order) -> tuple[list[Order], bool]:
        """Return the orders of a batch, and whether the queue was closed after them."""
        batch, end = [first], time.monotonic() + self._wait_s
        while len(batch) < self._batch_size:
            try:
                order = self._waiting.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if order is None:
                return batch, True
            batch.append(order)
        return batch, False

    def _serve(self, orders: Sequence[Order]) -> None:
        """Answer orders with equal settings together; one by one if that fails, so that a bad one fails alone."""
        if not orders:
            return
        try:
            replies = self._answer_together(orders)
        except Exception as error:  # of any kind: it belongs to who asked, and the thread goes on
            if len(orders) == 1:
                orders[0].found.set_exception(error)
                return
            for order in orders:
                self._serve([order])
            return
        for order, row in zip(orders, replies, strict=True):
            order.found.set_result(row)

    def _answer_together(self, orders: Sequence[Order]) -> list[Replies]:
        """Return the replies to each order. The questions about one photo share its pass, up to MAX_QUESTIONS."""
        rows: list[list[Order]] = []
        row_of: dict[str, list[Order]] = {}
        for order in orders:
            row = row_of.get(order.photo_id)
            if row is None or sum(len(each.questions) for each in row) + len(order.questions) > MAX_QUESTIONS:
                row = row_of[order.photo_id] = []
                rows.append(row)
            row.append(order)
        photos = [row[0].photo for row in rows]
        asked = [[question for order in row for question in order.questions] for row in rows]
        answered = self._answer(orders[0].settings, photos, asked)
        found: dict[int, Replies] = {}
        for row, replies in zip(rows, answered, strict=True):
            left = iter(replies)
            for order in row:
                found[id(order)] = [next(left) for _ in order.questions]
        return [found[id(order)] for order in orders]
