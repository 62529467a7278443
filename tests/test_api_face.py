"""The toolkit from Python: loading, asking, scoring, ms-swift's functions, the verbs as functions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_toys import ONE, opened, picture, write_model

import accessory
from accessory import GenerationConfig, get_model_tokenizer, get_template, inference, inference_stream
from accessory.assemble import TINY
from accessory.dist import Ranks
from accessory.engine import Engine, Request
from accessory.face.loaded import Model
from spawn import run_ranks

EXAMPLE = str(TINY / "example.png")
COUNT = "How many shapes are there?"


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    with accessory.load(dtype="fp32") as model:
        model.generation_config.max_new_tokens = 40
        yield model


@pytest.fixture(scope="module")
def template(tiny: Model):
    return get_template(accessory.get_default_template_type("tiny"), tiny.tokenizer)


def test_the_package_hands_its_names_on_without_importing_torch():
    code = (
        "import sys, accessory; assert set(accessory.__all__) <= set(dir(accessory)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(getattr(accessory, name) is not None for name in accessory.__all__)


# ---- Model


def test_a_question_and_messages_and_parts_ask_the_same(tiny):
    said = tiny.chat(COUNT, images=[EXAMPLE])
    part = {"type": "image_url", "image_url": {"url": EXAMPLE}}
    assert said == "There are 4 shapes."
    assert tiny.chat([{"role": "user", "content": f"<image>{COUNT}"}], [Path(EXAMPLE)]) == said
    assert tiny.chat([{"from": "human", "value": [part, {"type": "text", "text": COUNT}]}]) == said
    assert "".join(tiny.stream(COUNT, [EXAMPLE])) == said
    assert [result.text for result in tiny.generate([COUNT, COUNT], [[EXAMPLE], [EXAMPLE]])] == [said, said]
    assert tiny.chat(COUNT, [EXAMPLE], max_new_tokens=2) == "There are"


def test_photographs_are_upright_unless_that_is_not_wanted(tiny, tmp_path):
    image, seen = picture(5, (30, 20)), []
    exif = image.getexif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    for orientation in (None, "keep"):
        request = tiny.request("what", [tmp_path / "turned.png"], orientation=orientation)
        seen.append(request.pictures[0].size)
    assert seen == [(30, 20), (20, 30)]


def test_logits_are_those_of_a_plain_forward_and_score_sums_them(tiny):
    ids = [tiny.tokenizer.bos_id, *tiny.tokenizer.encode("Who are you? I am")]
    with torch.inference_mode():
        positions = torch.arange(len(ids))[None]
        hidden = tiny.bundle.model(torch.tensor([ids]), positions)
        plain = tiny.bundle.model.output(hidden)[0]
    torch.testing.assert_close(tiny.logits(ids), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tiny.logits("Who are you? I am"), plain, atol=1e-4, rtol=1e-4)
    scores = tiny.score("Who are you?", [" I am", " I", " x y z", ""])
    start = len(tiny.tokenizer.encode("Who are you?")) + 1
    odds = plain.log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]
    assert scores[0].logprob == pytest.approx(float(odds.sum()), abs=1e-3)
    assert scores[0].tokens == len(ids) - start and scores[3] == (scores[3].__class__)(0.0, 0, True)
    alone = [tiny.score("Who are you?", [text])[0].logprob for text in (" I am", " I", " x y z")]
    assert [score.logprob for score in scores[:3]] == pytest.approx(alone, abs=1e-4)


def test_the_answer_that_is_given_scores_best(tiny):
    asked = [{"role": "user", "content": f"<image>{COUNT}"}]
    right, wrong = tiny.score(asked, ["There are 4 shapes.", "There are 5 shapes."], [EXAMPLE])
    assert right.greedy and not wrong.greedy and right.logprob > wrong.logprob + 1


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.chat("x", max_token=3), "did you mean 'max_new_tokens'"),
        (lambda m: m.chat("x", num_beams=2), "no beam search"),
        (lambda m: m.chat("x", do_sample=True), "temperature: got 0"),
        (lambda m: m.generate("x"), "expected a list of questions"),
        (lambda m: m.generate(["x"], [[], []]), "got 2 lists for 1 questions"),
        (lambda m: m.score("x", "y"), "expected a list of texts"),
        (lambda m: m.logits([10**6]), "expected one or more token ids"),
        (lambda m: m.logits([]), "expected one or more token ids"),
        (lambda m: accessory.load(quant="int3"), "quant: got 'int3'"),
        (lambda m: accessory.load(dtype="int8"), "dtype: got 'int8'"),
        (lambda m: accessory.load(templat="x"), "did you mean 'template'"),
        (lambda m: accessory.load("nowhere"), "nowhere"),
        (lambda m: accessory.load(tp=0), "tensor_parallel_size: got 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(tiny, call, told):
    with pytest.raises((ValueError, OSError), match=told):
        call(tiny)


def test_a_closed_model_says_so():
    model = accessory.load(dtype="fp32")
    model.close()
    model.close()
    with pytest.raises(ValueError, match="after close"):
        model.chat("x")


LEAD = """
import accessory, json, psutil
with accessory.load(dtype="fp32", tp=2) as model:
    text = model.chat("How many shapes are there?", [EXAMPLE], max_new_tokens=40)
    scores = [s.logprob for s in model.score("Who are you?", [" I am", " x"])]
    try:
        accessory.load(tp=2)
    except ValueError as error:
        refused = str(error)
    other = accessory.load(dtype="fp32").chat("Who are you?", max_new_tokens=3)
    started = len(psutil.Process().children())
left = len(psutil.Process().children())
again = accessory.load(dtype="fp32").chat("Who are you?", max_new_tokens=3)
print(json.dumps([text, scores, refused, other, started, left, again]))
"""


def test_a_program_leads_two_ranks_and_close_ends_them(tiny):
    code = LEAD.replace("EXAMPLE", repr(EXAMPLE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    text, scores, refused, other, started, left, again = json.loads(done.stdout)
    assert text == "There are 4 shapes." and "close that one first" in refused and (started, left) == (1, 0)
    assert scores == pytest.approx([s.logprob for s in tiny.score("Who are you?", [" I am", " x"])], abs=1e-3)
    assert other == again == tiny.chat("Who are you?", max_new_tokens=3)


def read(ranks: Ranks, folder: Path) -> list | None:
    """Logits and scores with a picture, in pieces, on rows that answers do not need."""
    with Engine(opened(folder, ranks), ranks, rows=2, window=200, prefill_chunk=5) as engine:
        if not ranks.leader:
            return engine.follow()
        running = engine.submit(Request("the quick brown fox", template="none", max_gen_len=8))
        engine.step()
        asked = Request("what is it?", pictures=[picture(1)])
        found = [engine.logits(asked), engine.logits([1, 2, 3]), engine.score(asked, ["a fox", "a dog"])]
        while running.result is None:
            engine.step()
        return [*found, running.result.text]


def test_reading_is_the_same_on_two_ranks_and_disturbs_no_answer(tmp_path):
    folder = write_model(tmp_path / "model")
    one, (two, _) = read(ONE, folder), run_ranks(read, 2, folder)
    for left, right in zip(one[:2], two[:2], strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    assert [s.logprob for s in one[2]] == pytest.approx([s.logprob for s in two[2]], abs=1e-3)
    assert one[3] == two[3]
    engine = Engine(opened(folder), ONE, rows=1, window=200)
    assert engine.generate([Request("the quick brown fox", template="none", max_gen_len=8)])[0].text == one[3]


# ---- ms-swift's functions


def test_inference_answers_and_keeps_the_history(tiny, template, capsys):
    info: dict = {}
    mine: list = []
    text, history = inference(tiny, template, COUNT, mine, images=[EXAMPLE], generation_info=info, verbose=True)
    assert (text, history, mine) == ("There are 4 shapes.", [[COUNT, text]], [])
    assert info == {"num_prompt_tokens": 30, "num_generated_tokens": 5}
    assert capsys.readouterr().out.endswith(f"Assistant:[OUTPUT]{text}\n")
    more, history = inference(tiny, template, "What is in this picture?", history, images=[EXAMPLE])
    assert more.startswith("A small black circle") and [question for question, _ in history] == [COUNT, history[1][0]]


def test_a_stream_grows_by_whole_words_to_the_same_answer(tiny, template):
    query = "What is in this picture?"
    seen = list(inference_stream(tiny, template, query, images=[EXAMPLE]))
    texts = [text for text, _ in seen]
    assert all(later.startswith(text) and text.endswith(" ") for text, later in zip(texts, texts[1:], strict=False))
    assert seen[-1][0] == inference(tiny, template, query, images=[EXAMPLE])[0] and len(seen) > 3
    assert seen[0][1] == [[query, texts[0]]]


def test_a_generation_config_is_any_object_with_its_names(tiny, template):
    theirs = SimpleNamespace(max_new_tokens=2, do_sample=False, temperature=1.0, top_k=50, num_beams=1)
    for given in (theirs, {"max_new_tokens": 2}, GenerationConfig(max_new_tokens=2)):
        assert inference(tiny, template, COUNT, images=[EXAMPLE], generation_config=given)[0] == "There are"
    assert inference(tiny, template, COUNT, images=[EXAMPLE], stop_words=[" 4"])[0] == "There are"
    for call in (inference, inference_stream):
        with pytest.raises(ValueError, match="no beam search"):
            call(tiny, template, COUNT, generation_config={"num_beams": 4})


def test_answers_that_are_drawn_follow_the_seed(tiny, template):
    def draw() -> str:
        how = {"temperature": 3.0, "do_sample": True, "max_new_tokens": 12}
        return inference(tiny, template, "Who are you?", generation_config=how)[0]

    accessory.seed_everything(42)
    first, second = draw(), draw()
    accessory.seed_everything(42)
    assert (draw(), draw()) == (first, second) and first != second


def test_a_template_has_limits_and_a_system_text(tiny):
    short = get_template("tiny", tiny.tokenizer, max_length=10)
    with pytest.raises(ValueError, match="expected at most 10"):
        inference(tiny, short, COUNT * 3)
    cut = get_template("tiny", tiny.tokenizer, max_length=10, truncation_strategy="truncation_left")
    info: dict = {}
    inference(tiny, cut, COUNT * 3, generation_info=info, generation_config={"max_new_tokens": 2})
    assert info["num_prompt_tokens"] == 10
    assert get_template("llava-mistral-instruct", tiny.tokenizer).template_type == "swift/llava-mistral-instruct"
    with pytest.raises(ValueError, match="has no place for it"):
        get_template("tiny", tiny.tokenizer, default_system="be brief")
    with pytest.raises(ValueError, match="did you mean"):
        get_template("llava-mistral-instrukt", tiny.tokenizer)


def test_a_model_type_names_its_template():
    name = accessory.ModelType.llava1d6_mistral_7b_instruct
    assert name == "llava1d6-mistral-7b-instruct"
    assert accessory.get_default_template_type(name) == "llava-mistral-instruct"
    with pytest.raises(ValueError, match="did you mean 'llava1d6-mistral-7b-instruct'"):
        accessory.get_default_template_type("llava1d6-mistral-7b-instrukt")


def test_a_tokenizer_comes_without_its_model():
    model, tokenizer = get_model_tokenizer("tiny", load_model=False)
    assert model is None and tokenizer.size == 768
    with pytest.raises(ValueError, match="device_map"):
        get_model_tokenizer("tiny", model_kwargs={"load_in_8bit": True})
    with pytest.raises(ValueError, match="revision"):
        get_model_tokenizer("tiny", revision="v1")


# ---- the verbs as functions


def test_export_main_writes_a_folder_that_opens(tmp_path, tiny):
    folder = tmp_path / "exported"
    words = {"export_dir": str(folder), "export_form": "accessory", "export_dtype": "fp32", "export_verify": False}
    assert accessory.export_main(words) == {"export_dir": str(folder)}
    with accessory.load(folder, dtype="fp32") as model:
        assert model.chat("Who are you?") == tiny.chat("Who are you?")


@pytest.mark.slow
def test_sft_main_leaves_a_checkpoint_that_infer_main_answers_from(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = json.dumps({"query": f"<image>{COUNT}", "response": "There are 4 shapes.", "images": [EXAMPLE]})
    rows.write_text(f"{row}\n" * 10)
    words = {"dataset": [str(rows)], "sft_type": "lora", "max_steps": 2, "output_dir": str(tmp_path / "out")}
    done = accessory.sft_main(accessory.SftArguments(**words, dataset_test_ratio=0.2))
    assert done["global_step"] == 2 and Path(done["last_model_checkpoint"]).name == "checkpoint-2"
    assert done["log_history"] and done["best_metric"] > 0
    arguments = accessory.InferArguments(ckpt_dir=done["last_model_checkpoint"], load_dataset_config=True)
    answered = accessory.infer_main(arguments)["result"]
    assert [record["response"] for record in answered] == ["There are 4 shapes."] * 2
    with pytest.raises(ValueError, match="ended with exit code 1"):
        accessory.sft_main(accessory.SftArguments(**{**words, "dataset": [str(tmp_path / "none.jsonl")]}))


def test_infer_main_gives_the_records(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"query": COUNT, "response": "?", "images": [EXAMPLE]}) + "\n")
    words = {"dataset": [str(rows)], "result_dir": str(tmp_path / "out"), "precision": "fp32", "verbose": False}
    done = accessory.infer_main(words)
    assert [record["response"] for record in done["result"]] == ["There are 4 shapes."]
    assert json.loads(Path(done["result_path"]).read_text()) == done["result"][0]
    with pytest.raises(ValueError, match="expected Arguments, a mapping"):
        accessory.infer_main(3)
