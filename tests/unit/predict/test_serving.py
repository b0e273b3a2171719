"""The endpoints of launch/serve.py, asked by OpenAI's client and with the documented requests of labelling tools."""

from __future__ import annotations

import base64
import http.client
import io
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from running_server import running

from cogvlm_ft.checkpoints.choice import save_kept_boxes
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.wording import WORDING_FILE, load_wording, save_wording
from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.model.adapters import peft_config
from cogvlm_ft.predict import serve
from cogvlm_ft.predict.batching import AnswerQueue, BusyError, Order
from cogvlm_ft.predict.bodies import RefusedError
from cogvlm_ft.predict.files import question_of, reply_fields
from cogvlm_ft.predict.predictor import Asking, load_predictor
from cogvlm_ft.predict.replies import FoundBox, Reply
from cogvlm_ft.predict.served import ServedModels, Settings
from cogvlm_ft.settings import AdapterConfig

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
KEY = "0123456789abcdef-key"
LABELLING = (
    '<View><Image name="img" value="$image"/><RectangleLabels name="tag" toName="img">'
    '<Label value="狗"/></RectangleLabels></View>'
)
PROMPT = "Where is the red circle?"


def photo(number: int = 0) -> Image.Image:
    colours = [(200, 30, 20), (20, 160, 60), (10, 40, 200), (230, 220, 40)]
    return Image.new("RGB", (120 + 10 * number, 90), colours[number % 4])


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def messages(url: str, text: str = PROMPT) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def adapter(start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that peft wrote, whose second factor is not zero."""
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("adapter") / "shop"
    settings = AdapterConfig(rank=4, alpha=64.0, targets=["attention.language", "mlp.language"])
    model = get_peft_model(CogVLMForCausalLM.from_pretrained(start_model), peft_config(settings, "start"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a.png").write_bytes(png(photo()))
    return folder


@pytest.fixture(scope="module")
def served(start_model: Path, adapter: Path) -> ServedModels:
    return ServedModels(load_predictor(start_model, Asking(wording="box")), "start", {"shop": adapter})


@pytest.fixture(scope="module")
def port(served: ServedModels, photos: Path) -> Iterator[int]:
    answers = AnswerQueue(served.answer)
    app = serve.build_app(served, answers, "127.0.0.1", serve.Endpoints(True, KEY, photos))
    with running(app) as number:
        yield number
    answers.close()


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def post(port: int, path: str, body: object, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_openais_client_gets_text_boxes_and_streams(client: Any, served: ServedModels) -> None:
    assert [model.id for model in client.models.list()] == ["start", "shop"]
    assert client.models.retrieve("shop").id == "shop"
    asked = dict(model="start", messages=messages(data_url(photo())), max_tokens=24)
    more = {"decoding": "grammar", "min_boxes": 1}
    found = client.chat.completions.create(**asked, extra_body=more)
    alone = load_predictor(
        served.base.weights, Asking(wording="box", max_new_tokens=24, decoding="grammar", min_boxes=1)
    )
    [[reply]] = alone.ask([photo()], [[PROMPT]])
    assert reply.boxes, "the grammar has at least one box"
    assert found.choices[0].message.content == reply.text and found.choices[0].finish_reason in ("stop", "length")
    fields = json.loads(json.dumps({"image_size_px": photo().size, "answers": [reply_fields(reply)]}))
    assert found.model_extra["grounding"] == fields and fields["answers"][0]["boxes"][0]["confidence"] is not None
    assert found.usage.prompt_tokens > served.base.model.config.num_patches and found.usage.completion_tokens > 0

    parts = list(client.chat.completions.create(**asked, extra_body=more, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == reply.text
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason
    assert parts[-1].model_extra["grounding"] == fields
    both = client.chat.completions.create(
        **asked | {"messages": messages(data_url(photo()), "")}, extra_body={"targets": ["狗", "cat"]}
    )
    assert [len(both.model_extra["grounding"]["answers"]), both.choices[0].message.content.count("\n")] >= [2, 1]


def test_adapters_are_chosen_by_the_models_name(client: Any, served: ServedModels, adapter: Path) -> None:
    from peft import PeftModel

    asked = dict(messages=messages(data_url(photo())), max_tokens=8)
    texts = [
        client.chat.completions.create(model=name, **asked).choices[0].message.content
        for name in ("start", "shop", "start")
    ]
    assert texts[0] == texts[2] and texts[0] != texts[1]
    base = CogVLMForCausalLM.from_pretrained(served.base.weights)
    merged = load_predictor(served.base.weights, Asking(wording="box", max_new_tokens=8))
    merged.model = PeftModel.from_pretrained(base, adapter).eval()
    merged.model = merged.model.merge_and_unload()
    assert merged.ask([photo()], [[PROMPT]])[0][0].text == texts[1]


def test_an_adapter_is_asked_in_its_own_wording(start_model: Path, adapter: Path, tmp_path: Path) -> None:
    """Its model says "not found" in the sentences of that wording only, and its boxes count by its own choice."""
    own = shutil.copytree(adapter, tmp_path / "own")
    save_wording(load_wording("region"), own / WORDING_FILE)
    save_kept_boxes(KeptBoxes(0.7), own)
    served = ServedModels(load_predictor(start_model, Asking()), "start", {"own": own, "plain": adapter})
    found = [served._build_predictor(Settings(name, 8)) for name in (None, "own", "plain")]
    assert [each.wording.name for each in found] == ["box", "region", "box"]
    assert [each.kept.min_confidence for each in found] == [0.0, 0.7, 0.0]
    asked = ServedModels(load_predictor(start_model, Asking(wording="detection")), "start", {"own": own})
    assert asked._build_predictor(Settings("own")).wording.name == "detection"
    assert load_predictor(start_model, Asking(adapter=own)).wording.name == "region"


def test_earlier_turns_are_shown_to_a_model_whose_template_has_them(
    client: Any, served: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = "Question: who? Answer: nobody\nQuestion: where? Answer:"
    [[[alone]]] = served.answer(Settings(max_new_tokens=8), [photo()], [[question_of(whole)]])
    monkeypatch.setattr(served.base.model.config, "template_version", "chat")
    later = [{"role": "assistant", "content": "nobody"}, {"role": "user", "content": "where?"}]
    talk = [*messages(data_url(photo()), "who?"), *later]
    found = client.chat.completions.create(model="start", messages=talk, max_tokens=8)
    assert found.choices[0].message.content == alone.text and len(found.model_extra["grounding"]["answers"]) == 1


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"messages": messages("https://example.com/a.jpg")}, "invalid_image_url", "not fetched"),
        ({"messages": messages("file:///etc/passwd")}, "invalid_image_url", "not fetched"),
        ({"messages": messages("data:image/png;base64,@@")}, "invalid_image_url", "base64"),
        ({"messages": messages(data_url(photo()), " ")}, "invalid_request", "without text"),
        ({"messages": [{"role": "user", "content": PROMPT}]}, "invalid_request", "found 0 images"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid_request", "system prompt"),
        ({"messages": [*messages(data_url(photo()))] * 34}, "invalid_request", "at most 33"),
        (
            {
                "messages": [
                    *messages(data_url(photo())),
                    {"role": "assistant", "content": "x"},
                    {"role": "user", "content": "y"},
                ]
            },
            "invalid_request",
            "earlier turns",
        ),
        ({"messages": messages(data_url(photo()), "x" * 5000)}, "bad_question", "5000 characters"),
        (
            {"messages": messages("data:image/png;base64," + base64.b64encode(b"no photo").decode())},
            "bad_request",
            "broken_image",
        ),
        ({"n": 2}, "unsupported", "expected 1"),
        ({"max_tokens": 0}, "invalid_request", "at least 1"),
        ({"extra_body": {"min_boxes": 2}}, "bad_request", "free decoding"),
        ({"extra_body": {"decoding": "shell"}}, "invalid_request", "grammar"),
    ],
)
def test_what_is_refused(client: Any, change: dict[str, Any], code: str, word: str) -> None:
    asked = dict(model="start", messages=messages(data_url(photo())), max_tokens=4) | change
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.code == code and word in str(refused.value), refused.value


def test_who_has_no_key_gets_nothing(port: int, client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages(data_url(photo())))
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="another", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    basic = "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()
    for path, headers, expected in (
        ("/", {}, 401),
        ("/", {"Authorization": basic}, 200),
        ("/", {"Authorization": "Basic !"}, 401),
        ("/x-anylabeling/v1/models", {"Token": KEY}, 200),
        ("/health", {}, 200),
        ("/health", {"Host": "elsewhere.example"}, 400),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers=headers)
        assert connection.getresponse().status == expected, (path, headers)
    assert post(port, "/v1/chat/completions", {}, **{"Content-Type": "text/plain", "Authorization": basic})[0] == 415
    for host, key in (("0.0.0.0", None), ("127.0.0.1", "short"), ("::", "")):
        with pytest.raises(ConfigError, match="COGVLM_API_KEY"):
            serve.check_key(host, key)
    serve.check_key("127.0.0.1", None)
    serve.check_key("0.0.0.0", KEY)


def test_labelling_tools_get_rectangles(port: int, served: ServedModels) -> None:
    config = LABELLING
    tasks = [
        {"id": 1, "data": {"image": data_url(photo())}},
        {"id": 2, "data": {"image": "/data/local-files/?d=a.png"}},
    ]
    basic = {"Authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()}
    asked = {"tasks": tasks, "model_version": "", "project": "1.2", "label_config": config, "params": {"context": None}}
    assert post(port, "/label-studio/setup", {"project": "1.2", "schema": config}, **basic) == (
        200,
        {"model_version": "start"},
    )
    status, found = post(port, "/label-studio/predict", asked, **basic)
    assert status == 200 and len(found["results"]) == 2 and found["results"][0] == found["results"][1]
    for path in ("/data/local-files/?d=../../etc/passwd", "/data/upload/1/a.png", "http://localhost/a.png"):
        status, found = post(port, "/label-studio/predict", asked | {"tasks": [{"data": {"image": path}}]}, **basic)
        assert status == 400 and "error" in found
    body = {"model": "shop", "image": data_url(photo()), "params": {"text_prompt": "狗. cat", "conf_threshold": 0.0}}
    status, found = post(port, "/x-anylabeling/v1/predict", body, Token=KEY)
    assert status == 200 and found["success"] is True and isinstance(found["data"]["shapes"], list)
    status, found = post(port, "/x-anylabeling/v1/predict", body | {"model": "other"}, Token=KEY)
    assert status == 404 and found["error"]["code"] == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(("name", "shown"), [("模型", "模型"), ("a\x1b[2J", "a\\x1b[2J"), ("\ud83d", "\\ud83d")])
def test_an_unknown_model_is_named_as_it_was_asked_for(name: str, shown: str, served: ServedModels) -> None:
    with pytest.raises(RefusedError) as refused:
        served.adapter_of(name)
    assert f"model: found '{shown}'; expected one of " in str(refused.value)
    str(refused.value).encode()


def test_boxes_have_the_units_of_each_tool(served: ServedModels) -> None:
    from cogvlm_ft.predict import label_studio, x_anylabeling

    box = FoundBox((12.0, 9.0, 60.0, 45.0), 0.5, "狗")
    reply = Reply("?", "[[100,100,500,500]]", (box,), False, None)
    order = served.order(png(photo()), [question_of("?")], Settings())
    labelling = label_studio.read_labelling(LABELLING)
    [result] = label_studio.results(label_studio.Tasks(labelling, [order]), [[reply]], "v")["results"]
    [rectangle] = result["result"]
    assert rectangle["value"] == {"x": 10, "y": 10, "width": 40, "height": 40, "rotation": 0, "rectanglelabels": ["狗"]}
    assert (rectangle["from_name"], rectangle["to_name"], rectangle["original_width"]) == ("tag", "img", 120)
    [shape] = x_anylabeling.result([reply], {})["data"]["shapes"]
    assert shape["points"] == [[12, 9], [60, 9], [60, 45], [12, 45]] and shape["label"] == "狗"
    assert not x_anylabeling.result([reply], {"params": {"conf_threshold": 0.6}})["data"]["shapes"]


def test_several_clients_are_answered_together_as_if_alone(served: ServedModels) -> None:
    passes: list[int] = []

    def answer(settings: Any, images: Sequence[Image.Image], questions: Any) -> Any:
        passes.append(len(images))
        return served.answer(settings, images, questions)

    answers = AnswerQueue(answer, wait_s=0.5)
    settings = Settings(max_new_tokens=8)
    prompts = [PROMPT, "Where?", "small", "many", PROMPT]
    orders = [served.order(png(photo(min(i, 3))), [question_of(text)], settings) for i, text in enumerate(prompts)]
    with ThreadPoolExecutor(5) as clients:
        found = list(clients.map(lambda order: answers.submit(order).result(60), orders))
    answers.close()
    assert passes == [4], "photos 3 and 4 are the same"
    for order, [[reply]] in zip(orders, found, strict=True):
        [[[alone]]] = served.answer(settings, [order.photo], [order.questions])
        assert (reply.text, reply.prompt) == (alone.text, alone.prompt)


def test_a_bad_order_fails_alone_and_too_many_are_refused() -> None:
    go = threading.Event()

    def answer(settings: Any, images: Sequence[Image.Image], questions: Any) -> Any:
        go.wait(10)
        if any(each.prompt == "bad" for row in questions for each in row):
            raise ConfigError("bad")
        return [[[Reply(each.prompt, each.prompt, None, False, None)] for each in row] for row in questions]

    answers = AnswerQueue(answer, wait_s=0.0)
    orders = [Order(photo(), str(i), [question_of(text)]) for i, text in enumerate(["a", "bad", *"cdefgh"] * 8)]
    found = [answers.submit(order) for order in orders]
    with pytest.raises(BusyError, match="64 questions"):
        answers.submit(orders[0])
    found[2].cancel()
    go.set()
    answers.close()
    for i, (order, each) in enumerate(zip(orders, found, strict=True)):
        if order.questions[0].prompt == "bad":
            assert isinstance(each.exception(), ConfigError)
        elif i != 2:
            assert each.result()[0][0].text == order.questions[0].prompt
