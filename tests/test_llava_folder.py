"""From a folder that transformers wrote, model and processor, to the same ids, features and logits.

Must not look into files; test_hf_load and test_hf_names do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE
from fixtures import toys
from llava_toys import GRIDS, NEXT, PATCH, PLAIN, TILE, pictures, theirs
from meta import positions_of

from accessory.assemble import Bundle, open_model
from accessory.data.template import tagged
from accessory.engine import Request
from accessory.engine.prompt import Prompter

QUESTIONS = [
    "<image>\nwhat is it?",
    "<image>\n<image>\nthe quick brown fox",
    "what <image>\n is the fox <image> over it?",
]
NEXT_AS_HF = ("anyres", "spatial_unpad", "hf")


@dataclass
class Pair:
    """A folder, its model and processor at transformers, and what we made of it."""

    folder: Path
    model: Any
    processor: Any
    bundle: Bundle


def write(folder: Path, family: str, **more: Any) -> Pair:
    """A folder as save_pretrained leaves it."""
    import transformers
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    content = toys.llama_json()
    place = max(token["id"] for token in content["added_tokens"]) + 1
    content["added_tokens"].append(dict(content["added_tokens"][-1], id=place, content="<image>", special=True))
    folder.mkdir()
    (folder / "whole.json").write_text(json.dumps(content))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "whole.json"), bos_token="<s>", eos_token="</s>", add_bos_token=True
    )
    (folder / "whole.json").unlink()
    sizes = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    both = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava_next":
        eye = LlavaNextImageProcessorPil(image_grid_pinpoints=[list(pair) for pair in GRIDS], **sizes)
        processor = transformers.LlavaNextProcessor(eye, tokenizer, **both)
    else:
        eye = LlavaImageProcessorPil(**sizes, **more)
        processor = transformers.LlavaProcessor(eye, tokenizer, **both)
    model = theirs(NEXT if family == "llava_next" else PLAIN, vocab_size=place + 3, image=place)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Pair(folder, model, processor, open_model([folder], ranks=ONE, dtype=torch.float32))


@pytest.fixture(scope="module", params=["llava_next", "llava", "llava that pads"])
def pair(request, tmp_path_factory) -> Pair:
    family, _, pads = request.param.partition(" ")
    return write(tmp_path_factory.mktemp(family) / "model", family, **({"do_pad": True} if pads else {}))


@pytest.mark.parametrize("question", QUESTIONS)
def test_pixels_and_a_prompt_give_the_same_ids_features_and_logits(pair, question):
    images = pictures()[1 : 1 + question.count("<image>")]
    given = pair.processor(images=images, text=f"USER: {question} ASSISTANT:", return_tensors="pt")
    request = Request([tagged("user", question)], pictures=images, template="llava_1_5")
    prompt = Prompter(pair.bundle, window=pair.bundle.config.max_seq_len)(request)
    wanted, place = given["input_ids"][0].tolist(), pair.model.config.image_token_id
    assert [place if slot >= 0 else token for token, slot in zip(prompt.ids, prompt.slots, strict=True)] == wanted
    assert [slot for slot in prompt.slots if slot >= 0] == list(range(wanted.count(place)))
    with torch.no_grad():
        features = pair.bundle.model.vision(prompt.pixels, prompt.order)
        extra = {"image_sizes": given["image_sizes"]} if "image_sizes" in given else {}
        peer = torch.cat(list(pair.model.model.get_image_features(given["pixel_values"], **extra).pooler_output))
        torch.testing.assert_close(features, peer, atol=1e-4, rtol=1e-4)
        ids, slots = torch.tensor([prompt.ids]), torch.tensor([prompt.slots])
        hidden = pair.bundle.model(ids, positions_of(ids), features=features, slots=slots)
        ours, logits = pair.bundle.model.output(hidden), pair.model(**given).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)


def test_the_folder_says_how_pictures_are_cut(pair):
    vision, text = pair.bundle.vision, pair.folder.parent.name
    if text.startswith("llava_next"):
        assert (vision.aspect, vision.merge, vision.compat, vision.grid_pinpoints) == (*NEXT_AS_HF, GRIDS)
    else:
        pads = pair.processor.image_processor.do_pad
        assert (vision.aspect, vision.merge) == ("pad" if pads else "crop", "flat")


def test_a_folder_that_is_written_anew_has_a_processor_with_the_same_ids_and_pixels(pair, tmp_path):
    import transformers

    from accessory.export.main import main

    for form, source in (("accessory", pair.folder), ("hf", tmp_path / "accessory")):
        told = {"model_name_or_path": source, "export_dir": tmp_path / form, "export_form": form}
        assert main([f"{name}={value}" for name, value in {**told, "export_verify": "false"}.items()]) == 0
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    asked = {"images": pictures()[:2], "text": "USER: <image>\n<image>\nhi ASSISTANT:", "return_tensors": "pt"}
    wanted, found = pair.processor(**asked), processor(**asked)
    assert torch.equal(found["input_ids"], wanted["input_ids"])
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])
