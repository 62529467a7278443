"""`accessory webchat`: the verb. It opens a model, and serves its page on rank 0 while the other ranks follow.

Must not know pages: it brings together a model and who serves it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from accessory import dist
from accessory.config import parse
from accessory.dialect.translate import translator
from accessory.dialect.words import GenerationWords, ModelWords, ServingWords
from accessory.serve.budget import open_serving
from accessory.serve.extras import need
from accessory.serve.opening import (
    check_words,
    describe,
    open_bundle,
    resolved,
    sampling_of,
    start_ranks,
    template_of,
)
from accessory.serve.web.server import WEB, serve_page, wait_for_leader
from accessory.serve.web.talk import wishes
from accessory.serve.web.words import WebWords

log = logging.getLogger(__name__)


@dataclass
class WebchatSettings(ModelWords, GenerationWords, ServingWords, WebWords):
    """Talk with a model in a browser, alone or several people at once."""

    image: list[str] = field(default_factory=list)
    """A picture (path) that is in view when the page opens."""
    dry_run: bool = False
    """Print the settings as they are understood, and stop."""

    def check(self) -> None:
        """ValueError for values that cannot be."""
        self.check_web()
        self.check_serving()
        check_words(self, self)
        if len(self.image) > 1:
            raise ValueError(f"image: got {len(self.image)}, expected one to begin with; add the others in the page")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accessory webchat`. Raises ValueError or OSError for settings and models that cannot be, and
    ModuleNotFoundError where the packages of the page are missing."""
    settings = parse(
        WebchatSettings,
        argv,
        prog="accessory webchat",
        description=WebchatSettings.__doc__ or "",
        translate=translator("webchat"),
    )
    settings.check()
    if settings.dry_run:
        settings.key = None if settings.key is None else "(given)"
        sys.stdout.write(resolved(settings))
        return 0
    need("webchat", *WEB)
    ranks = start_ranks(settings)
    if ranks.dp_size > 1:
        raise ValueError(
            f"tensor_parallel_size: got {settings.tensor_parallel_size} in a job of {ranks.world} ranks, expected"
            f" {ranks.world}, as one model serves the page; leave it out"
        )
    bundle = open_bundle(settings, ranks)
    with open_serving(settings, settings, bundle, ranks, orientation="apply") as engine:
        if not ranks.leader:
            wait_for_leader()
            engine.follow()
        else:
            from accessory.serve.web.front import first_picture, front_of

            template = template_of(settings, bundle)
            log.info("model: %s", describe(bundle, template, engine))
            front = front_of(
                bundle,
                engine,
                template=template,
                wishes=wishes(sampling_of(settings), settings.max_new_tokens, settings.default_system),
                picture=first_picture(settings.image, sees=bundle.vision is not None),
            )
            serve_page(engine, front, settings, template=template, stops=settings.stop_words, queue=settings.queue)
    dist.close()
    return 0
