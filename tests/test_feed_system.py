"""default_system: a system text for the conversations of a data set that bring none.

Must not train.
"""

from __future__ import annotations

import json
from pathlib import Path

from accessory.data.feed import Corpus, FeedConfig, open_corpus, read_sources
from accessory.data.tokenizer import open_tokenizer

TINY = Path(__file__).resolve().parents[1] / "accessory" / "tiny"


def corpus(folder: Path, **more: object) -> Corpus:
    rows = [{"query": "a", "response": "b"}, {"query": "a", "response": "b", "system": "own words"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    sources = tuple(read_sources([str(folder / "rows.json")]))
    config = FeedConfig(sources=sources, template="vicuna_v1", cache_dir=str(folder), workers=0, **more)
    return open_corpus(config, open_tokenizer(TINY))


def test_it_opens_the_conversations_that_have_none_of_their_own(tmp_path):
    got = corpus(tmp_path, default_system="be brief")
    first, second = (got.example(index, open_tokenizer(TINY)) for index in (0, 1))
    assert first.startswith("<bos>be brief USER:") and second.startswith("<bos>own words USER:")
    assert got.conversation(0).turns[0].text == "be brief"


def test_it_makes_other_rows_of_the_same_file(tmp_path):
    assert corpus(tmp_path).fingerprint != corpus(tmp_path, default_system="be brief").fingerprint
