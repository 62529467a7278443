"""Conversations, tokens and pictures as numbers: tokenizers, templates, encoding, picture geometry.
Knows no model: nothing here imports weights, layers or an engine."""
