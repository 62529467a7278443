"""A model in a Python program: loaded on one rank or on several, asked in a line, and let go.

Must not know the words of other tools or how an answer is made: it brings the rooms together for one caller.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from accessory import dist
from accessory.config import nearest
from accessory.data.image import Orientation
from accessory.dialect.words import ModelWords
from accessory.dist import Ranks, Shard
from accessory.dist.place import read_place
from accessory.engine import Engine, Request, Result, Score
from accessory.face.generation import GenerationConfig, read_generation
from accessory.serve.asking import look
from accessory.serve.messages import read_messages
from accessory.serve.opening import check_words, open_bundle, open_engine, template_of

if TYPE_CHECKING:
    from torch import Tensor

    from accessory.assemble import Bundle
    from accessory.data.tokenizer import Tokenizer
    from accessory.engine.request import PictureSource

log = logging.getLogger(__name__)

_FOLLOW = (
    "import json, sys; told = json.loads(sys.argv[1]); sys.path[:] = told['path'];"
    " from accessory.face.follow import main; main(told)"
)
_WORDS = [each.name for each in fields(ModelWords)]
Paths = str | Path | Sequence[str | Path]


def load(
    path: Paths = (), *, tp: int | None = None, quant: Any = None, dtype: Any = None, rows: int = 8, **words: Any
) -> Model:
    """Open a model, from folders or hub ids (a base, then deltas or adapters); without any the tiny one that ships.

    tp: ranks that share it, which this process starts and `close` ends; under torchrun its ranks, of which only the
    first returns from here. quant: 4, "nf4" or True stores the layers' weights in 4 bits. dtype: fp32, bf16, fp16 or
    torch's; none: the device's default. rows: answers that are made at once. words: further settings of
    `accessory chat`, such as template, device, max_seq_len, tokenizer_path, adapter_name_or_path, allow_private_urls.
    Raises ValueError or OSError, in one sentence, for anything that does not fit.
    """
    told = model_words(path, quant=quant, dtype=dtype, **words)
    told.tensor_parallel_size = tp
    check_words(told)
    place, leading = read_place(os.environ), "ACCESSORY_STORE" in os.environ
    if leading and tp not in (None, 1):
        raise ValueError(f"tp: got {tp} while another model on several ranks is open here; close that one first")
    if leading or place.world == 1:
        return _opened(told, _alone(told.device), rows=rows) if tp in (None, 1) else _leading(told, tp, rows)
    dist.setup_logging(place.rank)
    ranks = dist.init(tp=place.world if tp is None else tp, device=told.device)
    if ranks.dp_size > 1:
        raise ValueError(f"tp: got {tp} in a job of {ranks.world} ranks, expected {ranks.world}; start as many")
    if not ranks.leader:
        serve(told, ranks, rows=rows)
        raise SystemExit(0)
    return _opened(told, ranks, rows=rows, joined=True)


def model_words(path: Paths = (), *, quant: Any = None, dtype: Any = None, **words: Any) -> ModelWords:
    """The settings of a model as the verbs know them. ValueError for a word that there is not."""
    for name in words:
        if name not in _WORDS:
            raise ValueError(f"{name}: unknown; {nearest(name, _WORDS)}")
    for name in ("adapter_name_or_path", "llama_config"):
        if isinstance(words.get(name), (str, Path)):
            words[name] = [words[name]]
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    words = {name: [str(item) for item in value] if isinstance(value, (list, tuple)) else value for name, value in
             words.items()}  # fmt: skip
    told = ModelWords(**{"model_name_or_path": [str(each) for each in paths], **words})
    if quant not in (None, False):
        if quant not in (4, "4", "nf4", True):
            raise ValueError(f"quant: got {quant!r}, expected 4 (NF4) or nothing")
        told.quantization_bit = 4
    if dtype is not None:
        named = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        text = str(dtype).removeprefix("torch.")
        name = named.get(text, text)
        if name not in named.values():
            raise ValueError(f"dtype: got {dtype!r}, expected fp32, bf16 or fp16")
        told.precision = name  # type: ignore[assignment]
    return told


class Model:
    """A model that answers. One caller at a time; `close` it, or use it in a `with`.

        with accessory.load("llava-v1.6-mistral-7b") as model:
            print(model.chat("What is this?", images=["cat.png"]))

    Questions are text, or messages under role and content (text with `<image>`, or parts). Pictures are paths, URLs,
    base64, bytes or PIL images. Calls take the fields of `generation_config` by name.
    """

    def __init__(self, bundle: Bundle, engine: Engine, *, words: ModelWords, joined: bool = False) -> None:
        self.bundle, self.engine, self.words = bundle, engine, words
        self.template = template_of(words, bundle)
        self.generation_config = GenerationConfig()
        self._joined, self._open = joined, True

    @property
    def tokenizer(self) -> Tokenizer:
        return self.bundle.tokenizer

    @property
    def sees(self) -> bool:
        """Whether pictures can come with a question."""
        return self.bundle.vision is not None

    def chat(
        self, asked: str | Sequence[Any], images: Sequence[PictureSource] = (), *, system: str | None = None, **how: Any
    ) -> str:
        """The answer to a question or to messages. Raises ValueError or OSError for what cannot be asked."""
        return self._engine().generate([self.request(asked, images, system=system, **how)])[0].text

    def stream(
        self, asked: str | Sequence[Any], images: Sequence[PictureSource] = (), *, system: str | None = None, **how: Any
    ) -> Iterator[str]:
        """The same, piece by piece; leaving the iteration stops the answer."""
        return self._engine().stream(self.request(asked, images, system=system, **how))

    def generate(
        self, asked: Sequence[Any], images: Sequence[Sequence[PictureSource]] | None = None, **how: Any
    ) -> list[Result]:
        """The results of many questions, answered together, in their order. images: those of each question."""
        if isinstance(asked, (str, Mapping)):
            raise ValueError(f"generate: got {asked!r:.60}, expected a list of questions; for one there is chat")
        shown = [()] * len(asked) if images is None else list(images)
        if len(shown) != len(asked):
            raise ValueError(f"images: got {len(shown)} lists for {len(asked)} questions, expected one for each")
        requests = [self.request(each, pictures, **how) for each, pictures in zip(asked, shown, strict=True)]
        return self._engine().generate(requests)

    def logits(self, asked: str | Sequence[Any], images: Sequence[PictureSource] = ()) -> Tensor:
        """Logits after every position, fp32 [T, vocabulary] on the CPU.

        asked: text as it is, after BOS; token ids as they are; or messages, written as the template does.
        """
        if isinstance(asked, Sequence) and not isinstance(asked, str) and all(isinstance(t, int) for t in asked):
            return self._engine().logits(list(asked))
        return self._engine().logits(self._raw(asked, images))

    def score(
        self, prompt: str | Sequence[Any], continuations: Sequence[str], images: Sequence[PictureSource] = ()
    ) -> list[Score]:
        """How likely each continuation is: after a text as it is, or as the answer to messages."""
        if isinstance(continuations, str):
            raise ValueError(f"continuations: got {continuations!r:.60}, expected a list of texts; write [...] around")
        return self._engine().score(self._raw(prompt, images), list(continuations))

    def request(
        self,
        asked: str | Sequence[Any],
        images: Sequence[PictureSource] = (),
        *,
        system: str | None = None,
        generation_config: Any = None,
        orientation: Orientation | None = None,
        **how: Any,
    ) -> Request:
        """What the engine is asked. orientation: none: photographs are turned as their EXIF says."""
        chosen = read_generation(generation_config, self.generation_config).changed(**how)
        turns, pictures = read_messages(asked, images, system=system)
        return Request(
            turns,
            pictures=self._seen(pictures, orientation),
            template=self.template,
            sampling=chosen.sampling(),
            max_gen_len=chosen.max_new_tokens,
            stops=chosen.stop_words,
        )

    def close(self) -> None:
        """Let go of the model and of the ranks that share it. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        self.engine.close()
        if self._joined:
            dist.close()
        del self.engine, self.bundle

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<accessory model {self.bundle.source}>" if self._open else "<accessory model, closed>"

    def _engine(self) -> Engine:
        if not self._open:
            raise ValueError("model: got a question after close; load it again")
        return self.engine

    def _raw(self, asked: str | Sequence[Any], images: Sequence[PictureSource]) -> Request:
        """A prompt that is read, not answered."""
        turns, pictures = read_messages(asked, images)
        template = "none" if isinstance(asked, str) else self.template
        return Request(turns, pictures=self._seen(pictures, None), template=template, max_gen_len=1)

    def _seen(self, pictures: Sequence[PictureSource], orientation: Orientation | None) -> list[Any]:
        """Pictures, opened here, so that each is turned once and fetched by these settings."""
        turn = orientation or self.words.orientation or "apply"
        return [look(each, orientation=turn, allow_private_urls=self.words.allow_private_urls) for each in pictures]


def serve(words: ModelWords, ranks: Ranks, *, rows: int) -> None:
    """On a rank that follows: take part until the leader closes."""
    bundle = open_bundle(words, ranks, for_good=False)
    with open_engine(words, bundle, ranks, rows=rows, orientation="keep", for_good=False) as engine:
        engine.follow()
    dist.close()


def _leading(words: ModelWords, tp: int, rows: int) -> Model:
    """Start followers, and lead them."""
    told = {"path": sys.path, "words": asdict(words), "tp": tp, "rows": rows}
    dist.launch(tp, argv=[sys.executable, "-c", _FOLLOW, json.dumps(told)])
    try:
        return _opened(words, dist.init(tp=tp, device=words.device), rows=rows, joined=True)
    except BaseException:
        dist.abandon()
        dist.close()
        raise


def _opened(words: ModelWords, ranks: Ranks, *, rows: int, joined: bool = False) -> Model:
    bundle = open_bundle(words, ranks, for_good=False)
    engine = open_engine(words, bundle, ranks, rows=rows, orientation="keep", for_good=False)
    return Model(bundle, engine, words=words, joined=joined)


def _alone(device: str) -> Ranks:
    """This process by itself, whatever other model it leads."""
    import torch

    chosen = dist.pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return Ranks(0, 1, 0, Shard(), 0, 1, chosen)
