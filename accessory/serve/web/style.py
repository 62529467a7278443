"""How the page looks: colours, measures, and the line on its model.

Must not fetch anything: its fonts are the browser's and gradio's own.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from accessory.serve.web.front import Front

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><defs><linearGradient id="g" x2="1" y2="1">'
    '<stop stop-color="#6366f1"/><stop offset="1" stop-color="#0ea5e9"/></linearGradient></defs>'
    '<rect width="32" height="32" rx="8" fill="url(#g)"/>'
    '<path d="M16 7 9 25h3.4l1.5-4.2h4.2l1.5 4.2H23Zm-1.1 11 1.1-3.3 1.1 3.3Z" fill="#fff"/></svg>'
)
CSS = """
.gradio-container { max-width: 1200px !important; }
.main .contain > .column { gap: 10px; }
footer { display: none !important; }
#top .top { display: flex; align-items: center; gap: 12px; }
#top svg { width: 38px; height: 38px; flex: none; }
#top h1 { font-size: 1.15rem; font-weight: 700; margin: 0 0 3px; line-height: 1.25; overflow-wrap: anywhere; }
#top .about { display: flex; flex-wrap: wrap; gap: 4px 6px; }
#top .about span { font-size: .75rem; padding: 1px 9px; border-radius: 999px; white-space: nowrap;
  color: var(--body-text-color-subdued); background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); }
#chat { height: 0 !important; flex: 1 1 0 !important; min-height: 180px !important; border-radius: 14px;
  border: 1px solid var(--border-color-primary); }
#chat .wrapper > .icon-button-wrapper, #chat button[aria-label="Share"], #chat .message-buttons-right,
  #chat .message.component .icon-button-wrapper { display: none; }
#chat .placeholder-content { padding-top: 14vh; text-align: center; }
#chat .placeholder-content .placeholder, #chat .placeholder-content .examples { flex: none; height: auto; }
#chat .placeholder-content .examples { margin-top: 20px; }
#chat .placeholder-content h2 { font-size: 1.4rem; font-weight: 700; margin: 0 0 4px; }
#chat .placeholder-content p { color: var(--body-text-color-subdued); margin: 0; }
#chat .message { border-radius: 16px !important; }
#chat .message.user { border-bottom-right-radius: 4px !important; }
#chat .message.bot { border-bottom-left-radius: 4px !important; }
#chat .message.component { width: auto !important; max-width: 190px; padding: 6px !important; }
#chat .message.component img { max-height: 170px; max-width: 100%; width: auto; border-radius: 11px; }
#below { align-items: center; gap: 8px; flex-wrap: nowrap; min-height: 32px; }
#line { flex: 1 1 auto !important; min-width: 0 !important; font-size: .85rem; line-height: 1.3; }
#line .note { color: var(--body-text-color-subdued); }
#line .error { color: #dc2626; font-weight: 700; overflow-wrap: anywhere; }
.dark #line .error { color: #f87171; }
#box { border-radius: 16px; }
#settings h2 { font-size: 1.05rem; font-weight: 700; margin: 0; }
#box button.submit-button, #box button.stop-button { background: var(--primary-500); color: #fff; }
#box button.submit-button:hover, #box button.stop-button:hover { background: var(--primary-600); }
"""
# gradio leads what stands in CSS to parts of the page; this is about the page's frame
FRAME = """
.gradio-container .main.fillable { padding-top: 10px !important; padding-bottom: 10px !important; }
@media (max-width: 640px) { .gradio-container .main.fillable { padding: 8px 10px !important; } }
"""
# the panel begins open where there is room for it
WIDE = "() => { if (window.innerWidth >= 1000) document.querySelector('#settings .toggle-button')?.click(); }"


def theme() -> Any:
    """Gradio's own, in our colours."""
    from gradio import themes

    font = themes.utils.fonts.LocalFont("IBM Plex Sans", weights=(400, 700))
    return themes.Default(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=[font, "system-ui", "sans-serif"],
    )


def head_of() -> str:
    """What stands in the page's head."""
    return f'<link rel="icon" href="data:image/svg+xml,{quote(_ICON)}"><style>{FRAME}</style>'


def top_of(front: Front) -> str:
    """The line on the model."""
    about = "".join(f"<span>{html.escape(fact)}</span>" for fact in front.about)
    return (
        f'<div class="top" title="{html.escape(front.source)}">{_ICON}'
        f'<div><h1>{html.escape(front.name)}</h1><div class="about">{about}</div></div></div>'
    )
