"""Compare clients that are answered together with the same clients answered one by one; then kinds of weights.

    python bench/serving.py [--clients 8] [--rounds 3] [--threads 2] [--new-tokens 32]

Every client asks one question about its own photo, as soon as its last one is answered. Both sides use the same queue,
with batches of 8 and of 1, and alternate. Then the same questions are asked of the model in bf16 and with quantised
linear layers. Prints questions per second, equal answers, and for each kind of weights its bytes and the change of the
logits. Weights are random and in fp32 on a CPU: on a GPU ratios differ.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from generate import Numbers
from PIL import Image
from torch import Tensor
from train_step import CONFIG

from cogvlm_ft.build import load_whole_model
from cogvlm_ft.data.frames import photo_frame
from cogvlm_ft.data.transforms import model_input
from cogvlm_ft.evaluate.generate import generate_answers
from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.model.layout import build_layout
from cogvlm_ft.model.quantized import stored_tensors
from cogvlm_ft.predict.batching import AnswerQueue, Order, Replies
from cogvlm_ft.predict.files import Question, question_of
from cogvlm_ft.predict.replies import Reply

QUESTIONS_EACH = 2
KINDS = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "int8": (torch.bfloat16, "int8")}
KINDS["int4"] = torch.bfloat16, "int4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = CogVLMForCausalLM(CONFIG).eval().requires_grad_(False)
    compare_batches(model, args.clients, args.rounds, args.new_tokens)
    compare_weights(model, args.rounds)


def compare_batches(model: CogVLMForCausalLM, num_clients: int, rounds: int, num_new: int) -> None:
    seconds: dict[int, list[float]] = {1: [], num_clients: []}
    answers: dict[int, list[str]] = {}
    for _ in range(rounds):
        for batch_size, taken in seconds.items():
            start = time.perf_counter()
            answers[batch_size] = ask_all(model, num_clients, batch_size, num_new)
            taken.append(time.perf_counter() - start)
    asked = num_clients * QUESTIONS_EACH
    alone, together = (asked / statistics.median(taken) for taken in seconds.values())
    num_equal = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(
        f"{num_clients} clients, one photo each, {num_new} new tokens: together {together:.2f} questions/s, one by one"
    )
    print(f"  {alone:.2f}: {together / alone:.2f} x; answers equal {num_equal} of {asked}", flush=True)


def ask_all(model: CogVLMForCausalLM, num_clients: int, batch_size: int, num_new: int) -> list[str]:
    """Return the answers to all questions of all clients, each of which is a thread."""
    size = CONFIG.image_size

    def answer(
        settings: Hashable, photos: Sequence[Image.Image], questions: Sequence[Sequence[Question]]
    ) -> list[Replies]:
        pixels = torch.stack([model_input(photo, photo_frame(photo.size, "squash"), size) for photo in photos])
        prompts = [[question.prompt for question in row] for row in questions]
        with torch.no_grad():
            found = generate_answers(model, Numbers(), pixels, prompts, num_new)  # type: ignore[arg-type]
        return [[[Reply("", each.text, None, False, None)] for each in row] for row in found]

    queue = AnswerQueue(answer, batch_size=batch_size)
    texts = [""] * (num_clients * QUESTIONS_EACH)

    def client(number: int) -> None:
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        for turn in range(QUESTIONS_EACH):
            prompt = " ".join(str(5 + (number * 7 + turn + k) % 900) for k in range(16))
            order = Order(Image.fromarray(noise), str(number), [question_of(prompt)])
            texts[number * QUESTIONS_EACH + turn] = queue.submit(order).result()[0][0].text

    clients = [threading.Thread(target=client, args=(number,)) for number in range(num_clients)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    queue.close()
    return texts


def compare_weights(model: CogVLMForCausalLM, rounds: int) -> None:
    pixels = torch.randn(1, 3, CONFIG.image_size, CONFIG.image_size)
    layout = build_layout(CONFIG.num_patches, [16])
    ids = torch.randint(3, CONFIG.vocab_size, (1, len(layout.block_ids)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        exact: Tensor | None = None
        for name, (dtype, kind) in KINDS.items():
            loaded = load_whole_model(Path(folder), dtype, quantized=kind)
            mib = sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(loaded).values()) / 2**20
            seconds, logits = timed(lambda m=loaded: m(input_ids=ids, pixel_values=pixels).logits.float(), rounds)  # type: ignore[misc]
            exact = logits if exact is None else exact
            error = float((logits - exact).norm() / exact.norm())
            print(
                f"{name}: weights {mib:.0f} MiB, one pass {seconds:.2f} s, logits off by {error:.4f} of their norm",
                flush=True,
            )


def timed(work: Callable[[], Tensor], rounds: int) -> tuple[float, Tensor]:
    taken = []
    with torch.no_grad():
        for _ in range(rounds):
            start = time.perf_counter()
            result = work()
            taken.append(time.perf_counter() - start)
    return statistics.median(taken), result


if __name__ == "__main__":
    main()
